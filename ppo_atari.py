"""PPO for Atari games from pixels (Schulman et al. 2017, arXiv:1707.06347), the baseline of `blpo_atari.py`.

Actor theta and critic omega, two heads on one convolutional network (Mnih et al. 2015) or, with
`--separate-trunks`, on two, are improved at the same time on minibatches of the last rollout:

    delta_t = reward_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)           eq. (12)
    A_t     = sum_{k >= t} (gamma lambda)^{k-t} delta_k   to the life's end     eq. (11) -> gae
    ratio_t = pi_theta(a_t|s_t) / pi_old(a_t|s_t)
    J       = mean_t min(ratio_t A_t, clip(ratio_t, 1-eps, 1+eps) A_t)          eq. (7) -> clipped_surrogate
    L       = mean_t (G_t - V_omega(s_t))^2 / 2,  G_t = A_t + V_old(s_t)        -> value_loss
    theta, omega  <-  Adam on  -J + vf_coef L - ent_coef H                      eq. (9)

A reward is the sign of the points won. A is normalised in each minibatch, and L is the larger of this error
and the same after the values' change has been clipped. Settings and preprocessing are those of CleanRL's
`ppo_atari` (numbered in docs/atari.md): a lost life is a termination for the learner, the returns that are
logged are the points of whole games. EnvPool plays the games. Put right: the row that follows a lost life or
a game is a reset and no transition, so it is in no loss and no statistic; a game is over when EnvPool says
so, not when no life is left; a time limit is bootstrapped (`--no-bootstrap-truncation`: it is a termination).

    python ppo_atari.py --env-id Breakout-v5
"""

# ---- Imports -----------------------------------------------------------------------------------------
import argparse
import contextlib
import csv
import functools
import importlib.metadata
import json
import math
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
    """The run, the game, then PPO."""

    exp_name: str = Path(__file__).stem
    """name of the experiment"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """seed of the games, the initial weights, the actions and the minibatches"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto: cuda if there is one"""
    torch_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """PyTorch's threads on a CPU; 0: one for each usable core, far too many where other programs keep these
    busy; the number changes rounding"""
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
    """games played at the end with actions drawn from the policy"""
    capture_video: bool = False
    """film one such game"""

    env_id: str = "Breakout-v5"
    """an Atari game by its name in EnvPool; ALE/Breakout-v5 and BreakoutNoFrameskip-v4 mean the same game"""
    env_kwargs: Annotated[str, pydantic.AfterValidator(json_object)] = "{}"
    """more options of EnvPool's Atari games, as JSON: '{"max_episode_steps": 5000}'"""
    env_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """EnvPool threads; 0: one for each usable core, at most num_envs"""
    episodic_life: bool = True
    """a lost life is a termination for the learner; logged returns are of whole games all the same"""
    clip_reward: bool = True
    """learn from the sign of the points; logged returns are points all the same"""
    repeat_action_probability: Fraction = 0.0
    """probability that the game takes the last action again (sticky actions)"""
    total_timesteps: PositiveInt = 10_000_000
    """environment steps of 4 frames in all, rounded down to whole rollouts"""
    num_envs: Annotated[int, Field(ge=1, le=65536)] = 8
    """parallel games"""

    num_steps: Annotated[int, Field(ge=2)] = 128
    """steps of each game in a rollout"""
    learning_rate: PositiveFloat = 2.5e-4
    """Adam step size of the actor and of a shared trunk"""
    critic_learning_rate: PositiveFloat | None = None
    """Adam step size of the critic's own parameters; default: learning_rate"""
    anneal_lr: bool = True
    """lower both step sizes linearly to 0"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of the advantages and of the critic's targets"""
    bootstrap_truncation: bool = True
    """a time limit bootstraps from the final observation; otherwise it counts as a termination"""
    num_minibatches: PositiveInt = 4
    """minibatches in an epoch"""
    update_epochs: PositiveInt = 4
    """passes over a rollout"""
    norm_adv: bool = True
    """normalise the advantages in each minibatch"""
    clip_coef: PositiveFloat = 0.1
    """eps of the clipped ratio"""
    clip_vloss: bool = True
    """clip the change of the value as well"""
    ent_coef: NonNegativeFloat = 0.01
    """weight of the entropy bonus"""
    vf_coef: NonNegativeFloat = 0.5
    """weight of the value loss"""
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 0.5
    """largest norm of the joint gradient"""
    target_kl: PositiveFloat | None = None
    """stop the epochs of a rollout once the approximate KL divergence exceeds this; default: never"""
    separate_trunks: bool = False
    """a convolutional network of its own for the critic, as BLPO needs it"""

    @pydantic.model_validator(mode="after")
    def check_shapes(self):
        """Raise BadInput unless there is a whole rollout and the minibatches divide it."""
        rows = self.num_envs * self.num_steps
        if rows > 500_000:
            raise BadInput(f"--num-envs x --num-steps is {rows}, a rollout may have 500,000 rows of 28 KB")
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


# ---- Atari games (shared) ----------------------------------------------------------------------------
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


def game_name(env_id: str) -> str:
    """The game's name in EnvPool: Pong-v5 also for ALE/Pong-v5, PongNoFrameskip-v4 and Pong-v4."""
    old = re.fullmatch(r"(?:ALE/)?(\w+?)(?:NoFrameskip|Deterministic)?-v[0-5]", env_id)
    return f"{old.group(1)}-v5" if old else env_id


def usable_cores() -> list[int]:
    """The cores that this process may use, in order."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else [*range(os.cpu_count())]


def make_envs(args, num_envs: int, seed: int, **options) -> gym.vector.VectorEnv:
    """Parallel games, preprocessed by EnvPool: 1 to 30 frames without an action at the start, the last with
    FIRE in games that have it; an action lasts 4 frames, of the last two the brighter pixels count; 84 x 84
    grey pixels; the last 4 images are an observation (4, 84, 84).

    They reset on the step after an end (Gymnasium's NEXT_STEP mode). What the flags of `step` mean:
        terminated without info["terminated"]  a lost life (with episodic_life); the game goes on after it
        terminated with info["terminated"]     the game is over
        truncated                              the game is cut off after 27,000 steps
    The row after any of these is a reset: its action is ignored, reward and info["reward"] (the points, not
    clipped) are 0. In the reset after a lost life the game goes on for 1 to 30 such frames.

    Raises BadInput if there is no such game or option.
    """
    cores = usable_cores()
    threads = args.env_threads or min(len(cores), num_envs)
    # Pinned threads take a quarter to a third less time a step. They are pinned only where they fill all the
    # cores of this process, so that several small runs never crowd on the same ones.
    pinned = threads >= len(cores) == cores[-1] - cores[0] + 1
    kwargs = {"num_threads": threads, "thread_affinity_offset": cores[0] if pinned else -1}
    kwargs |= {"episodic_life": args.episodic_life, "reward_clip": args.clip_reward}
    kwargs |= {"repeat_action_probability": args.repeat_action_probability}
    kwargs |= json.loads(args.env_kwargs) | options
    with task_errors(args.env_id):
        import envpool  # there is no other backend; where it is not installed, the sentence says so

        given = {"num_envs": num_envs, "batch_size": num_envs, "seed": seed}  # ours alone
        envs = envpool.make_gymnasium(game_name(args.env_id), **given, **kwargs)
    if envs.observation_space.shape != (4, 84, 84):
        needs = f"has observations {envs.observation_space.shape}; this script needs (4, 84, 84)"
        raise BadInput(f"--env-id {args.env_id!r} {needs}")
    return envs


class Game(gym.Env):
    """One game as Gymnasium has environments, for `play`: a reward is the points won, and only the end of
    the game ends it. A lost life is what it is in training."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # steps of 4 frames

    def __init__(self, args, render_mode: str | None = None, **kwargs):
        self.render_mode = render_mode
        drawn = {"render_mode": render_mode} if render_mode else {}
        self.make = functools.partial(make_envs, args, 1, **kwargs | drawn)
        self.envs = self.make(seed=0)
        self.observation_space, self.action_space = self.envs.observation_space, self.envs.action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """EnvPool takes a seed when it is made."""
        self.envs = self.envs if seed is None else self.make(seed=seed)
        return self.envs.reset()[0][0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """The reward is not clipped."""
        images, _, _, truncated, info = self.envs.step(np.array([action]))
        return images[0], float(info["reward"][0]), bool(info["terminated"][0]), bool(truncated[0]), {}

    def render(self) -> np.ndarray:
        """The screen in colour (210, 160, 3)."""
        return self.envs.render()[0]


# ---- Atari networks (shared) -------------------------------------------------------------------------
def layer_init(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """The layer with orthogonal weights and zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def nature_cnn(channels: tuple[int, int, int] = (32, 64, 64), width: int = 512) -> nn.Sequential:
    """The network of Mnih et al. 2015 up to its last hidden layer: images (n, 4, 84, 84) in [0, 1] ->
    features (n, width)."""
    first, second, third = channels
    return nn.Sequential(
        layer_init(nn.Conv2d(4, first, 8, stride=4)),
        nn.ReLU(),
        layer_init(nn.Conv2d(first, second, 4, stride=2)),
        nn.ReLU(),
        layer_init(nn.Conv2d(second, third, 3)),
        nn.ReLU(),
        nn.Flatten(),
        layer_init(nn.Linear(third * 7 * 7, width)),
        nn.ReLU(),
    )


def pixels(obs: Tensor) -> Tensor:
    """Grey values 0..255 (n, 4, 84, 84) as floats in [0, 1], channels last in memory: there the convolutions
    and their gradients take three quarters of the time."""
    return obs.contiguous(memory_format=torch.channels_last) * (1 / 255)


def logprob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(a|s) of actions (...) under logits (..., A); the entropy in nats; both (...)."""
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, actions[..., None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


class Agent(nn.Module):
    """Categorical actor, the softmax of its logits, and critic: linear heads on one trunk or on two.

    A trunk may be any nn.Sequential from images (n, 4, 84, 84) to features (n, F). Called with raw
    observations, the agent is the policy as it is played.
    """

    def __init__(self, num_actions: int, separate_trunks: bool = False):
        super().__init__()
        self.actor_trunk = nature_cnn()
        self.critic_trunk = nature_cnn() if separate_trunks else self.actor_trunk
        width = self.actor_trunk(torch.zeros(1, 4, 84, 84)).shape[1]
        self.actor_head = layer_init(nn.Linear(width, num_actions), gain=0.01)
        self.critic_head = layer_init(nn.Linear(width, 1), gain=1.0)

    def actor_parameters(self) -> list[nn.Parameter]:
        """theta: the actor's trunk, which a critic may share, and its head."""
        return [*self.actor_trunk.parameters(), *self.actor_head.parameters()]

    def critic_parameters(self) -> list[nn.Parameter]:
        """omega: all that is not theta."""
        shared = self.critic_trunk is self.actor_trunk
        return [*(() if shared else self.critic_trunk.parameters()), *self.critic_head.parameters()]

    def logits(self, obs: Tensor) -> Tensor:
        """The actor's logits (n, A) at observations (n, 4, 84, 84)."""
        return self.actor_head(self.actor_trunk(pixels(obs)))

    def logits_and_values(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, A) and values (n,) at observations (n, 4, 84, 84); a shared trunk sees them once."""
        images = pixels(obs)
        features = self.actor_trunk(images)
        shared = self.critic_trunk is self.actor_trunk
        critic_features = features if shared else self.critic_trunk(images)
        return self.actor_head(features), self.critic_head(critic_features).squeeze(-1)

    def forward(self, raw_obs: Tensor) -> Tensor:
        """The policy as it is played: raw observations (..., 4, 84, 84), or flat ones (..., 28224) ->
        actions (...), drawn: the most probable ones get stuck in a game that waits for FIRE."""
        obs = torch.as_tensor(raw_obs)
        shape = obs.shape[:-3] if obs.shape[-1] == 84 else obs.shape[:-1]
        probabilities = self.logits(obs.reshape(-1, 4, 84, 84)).softmax(-1)
        return torch.multinomial(probabilities, 1).view(shape)


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


# ---- Training on Atari: set-up (shared) --------------------------------------------------------------
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
        torch.backends.cudnn.deterministic = True  # so that a run on a CUDA device repeats bitwise, too
        if device.type == "cpu":
            torch.set_num_threads(args.torch_threads or len(usable_cores()))
        envs = make_envs(args, args.num_envs, derived_seed(args.seed, start))
        game = gym.envs.registration.EnvSpec(args.env_id, functools.partial(Game, args))
        gym.registry[args.env_id] = game  # `play` makes its environments by their names
        if args.eval_episodes or args.capture_video:
            play(None, args, episodes=0)
        num_actions = int(envs.action_space.n)

        # ---- Networks and optimisers -----------------------------------------------------------------
        agent_sizes = num_actions, args.separate_trunks
        agent = Agent(*agent_sizes).to(device, memory_format=torch.channels_last).eval()
        parameters = [
            {"params": agent.actor_parameters(), "lr": args.learning_rate},
            {"params": agent.critic_parameters(), "lr": args.critic_learning_rate or args.learning_rate},
        ]
        optimisers = [torch.optim.Adam(parameters, eps=1e-5, fused=True)]

        # ---- Training on Atari: buffers and the loop (shared) ----------------------------------------
        step_sizes = [group["lr"] for each in optimisers for group in each.param_groups]
        if checkpoint:
            try:
                agent.load_state_dict(checkpoint["agent"])
                for each, state in zip(optimisers, checkpoint["optimisers"], strict=True):
                    each.load_state_dict(state)
                torch.set_rng_state(checkpoint["rng"])  # all noise and all minibatches are drawn on the CPU
            except (RuntimeError, ValueError, KeyError) as error:
                wrong = "another version made it, or networks of another shape; leave out what shapes them"
                raise BadInput(f"--resume {args.resume}: {wrong}") from error
        groups = [group for each in optimisers for group in each.param_groups]
        trained = sorted(id(weight) for group in groups for weight in group["params"])
        if trained != sorted(id(weight) for weight in agent.parameters()):
            raise BadInput("every parameter of the agent must be one of the actor's or one of the critic's")

        # The rollout: arrays (time, game, ...); row num_steps of obs is the next rollout's first. The images
        # stay bytes, and what the networks see and say is where they live.
        shape = (args.num_steps, args.num_envs)
        obs = torch.zeros(args.num_steps + 1, args.num_envs, 4, 84, 84, dtype=torch.uint8, device=device)
        logits = torch.zeros(*shape, num_actions, device=device)
        values = torch.zeros(args.num_steps + 1, args.num_envs, device=device)
        actions = torch.zeros(shape, dtype=torch.int64, device=device)
        rewards, terminated, truncated, valid = (np.zeros(shape, dtype=np.float32) for _ in range(4))
        ended = np.zeros(args.num_envs, dtype=bool)  # a life or a game, in the last step; a reset follows
        game_points, game_lengths = np.zeros((2, args.num_envs))
        run.open()
        obs[-1] = torch.from_numpy(envs.reset()[0])
        num_iterations = args.total_timesteps // batch_size
        for iteration in range(start // batch_size + 1, num_iterations + 1):
            for group, size in zip(groups, step_sizes):
                group["lr"] = size * (1 - (iteration - 1) / num_iterations) if args.anneal_lr else size

            # ---- Training on Atari: collect a rollout (shared) ---------------------------------------
            rollout_start, env_time, episodes = time.perf_counter(), 0.0, []
            obs[0] = obs[-1]
            # The largest sum of logit and Gumbel noise is a sample of the softmax (Maddison et al. 2014).
            noise = (-torch.empty(*shape, num_actions).exponential_().log_()).to(device)
            for t in range(args.num_steps):
                with torch.no_grad():
                    logits[t], values[t] = agent.logits_and_values(obs[t])
                    actions[t] = (logits[t] + noise[t]).argmax(-1)
                game_actions = actions[t].cpu().numpy()
                env_start = time.perf_counter()
                images, reward, ends, cut, info = envs.step(game_actions)
                env_time += time.perf_counter() - env_start
                obs[t + 1] = torch.from_numpy(images)
                transition, ended = ~ended, ends | cut
                rewards[t], terminated[t], truncated[t], valid[t] = reward, ends, cut, transition
                game_points += np.where(transition, info["reward"], 0.0)
                game_lengths += transition
                for index in ((info["terminated"] != 0) | cut).nonzero()[0].tolist():  # games, not lives
                    step = (iteration - 1) * batch_size + (t + 1) * args.num_envs
                    seconds, length = time.perf_counter() - run.started, int(game_lengths[index])
                    episode = step, seconds, index, float(game_points[index]), length
                    episodes.append(dict(zip(EPISODES, episode)))
                    game_points[index] = game_lengths[index] = 0

            # ---- Training on Atari: values, advantages and targets of the rollout (shared) -----------
            update_start = time.perf_counter()
            ending = np.maximum(terminated, truncated)
            discounts = args.gamma * (1 - (terminated if args.bootstrap_truncation else ending))
            arrays = rewards, discounts, ending, valid
            b_rewards, b_discounts, b_ended, b_valid = (torch.tensor(x, device=device) for x in arrays)
            with torch.no_grad():
                values[-1] = agent.logits_and_values(obs[-1])[1]
                logprobs, _ = logprob_and_entropy(logits, actions)
            advantages = gae(b_rewards, values, b_discounts, args.gamma * args.gae_lambda * (1 - b_ended))
            returns = advantages + values[:-1]

            # ---- Update ------------------------------------------------------------------------------
            rows = b_valid.flatten().nonzero().squeeze(-1)  # transitions; a reset is none
            arrays = obs[:-1], actions, logprobs, advantages, values[:-1], returns
            transitions = [array.flatten(0, 1)[rows] for array in arrays]
            num_minibatches = max(1, min(args.num_minibatches, len(rows) // 2))
            for epoch in range(args.update_epochs):
                statistics = []  # of each minibatch of this epoch; read once, after the update
                for part in torch.randperm(len(rows)).to(device).tensor_split(num_minibatches):
                    minibatch = [array[part] for array in transitions]
                    mb_obs, mb_actions, mb_logprobs, mb_advantages, mb_values, mb_returns = minibatch
                    new_logits, new_values = agent.logits_and_values(mb_obs)
                    new_logprobs, entropies = logprob_and_entropy(new_logits, mb_actions)
                    logratio, entropy = new_logprobs - mb_logprobs, entropies.mean()
                    ratio = logratio.exp()
                    if args.norm_adv and len(mb_advantages) > 1:
                        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                    policy_loss = -clipped_surrogate(ratio, mb_advantages, args.clip_coef).mean()
                    value_clip = args.clip_coef if args.clip_vloss else None
                    critic_loss = value_loss(new_values, mb_values, mb_returns, value_clip)
                    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * critic_loss
                    optimisers[0].zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimisers[0].step()
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

            # ---- Training on Atari: log and checkpoint (shared) --------------------------------------
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
            weights = torch.stack([weight.sum() for weight in agent.parameters()])
            watched = {"rewards": b_rewards, "losses": torch.stack(statistics), "weights": weights}
            for name, numbers in watched.items():
                if not numbers.isfinite().all():
                    raise Diverged(f"the {name} stopped being finite by step {iteration * batch_size:,}")
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
