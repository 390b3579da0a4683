"""PPO for Atari games from pixels (Schulman et al. 2017, arXiv:1707.06347), the baseline of `blpo_atari.py`.

Actor theta and critic omega, two heads on one convolutional network (Mnih et al. 2015) or, with `--separate-trunks`, on
two, are improved at the same time on minibatches of the last rollout:

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)                 r_t the sign of the points won
    A_t     = sum_{k >= t} (gamma lambda)^{k-t} delta_k      up to the end of the life      GAE, eq. (11)   -> gae
    r_t     = pi_theta(a_t|s_t) / pi_old(a_t|s_t)
    J       = mean_t min(r_t A_t, clip(r_t, 1-eps, 1+eps) A_t)                               eq. (7)    -> clipped_surrogate
    L       = mean_t (G_t - V_omega(s_t))^2 / 2,  G_t = A_t + V_old(s_t)                     eq. (9)    -> value_loss
    theta, omega  <-  Adam on  -J + vf_coef L - ent_coef H

Settings and preprocessing are those of CleanRL's `ppo_atari` (numbered in docs/ppo.md): a lost life is a termination for the
learner, the returns that are logged are the points of whole games. EnvPool plays the games. Put right: the row that follows
a lost life or a game is a reset and no transition, so it is in no loss and no statistic; a game is over when EnvPool says
so, not when no life is left; a time limit is bootstrapped (`--no-bootstrap-truncation`: it is a termination).

    python ppo_atari.py --env-id Breakout-v5
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
    """Adam step size of the actor and of a shared trunk, in (0, inf)"""
    critic_learning_rate: float | None = None
    """Adam step size of the critic's own parameters, in (0, inf); default: learning_rate"""
    anneal_lr: bool = True
    """lower both step sizes linearly to 0"""
    gamma: float = 0.99
    """discount factor, in [0, 1]"""
    gae_lambda: float = 0.95
    """lambda of the advantages and of the critic's targets, in [0, 1]"""
    bootstrap_truncation: bool = True
    """a time limit bootstraps from the final observation; otherwise it counts as a termination"""
    num_minibatches: int = 4
    """minibatches in an epoch, in [1, inf)"""
    update_epochs: int = 4
    """passes over a rollout, in [1, inf)"""
    norm_adv: bool = True
    """normalise the advantages in each minibatch"""
    clip_coef: float = 0.1
    """eps of the clipped ratio, in (0, inf)"""
    clip_vloss: bool = True
    """clip the change of the value as well"""
    ent_coef: float = 0.01
    """weight of the entropy bonus, in [0, inf)"""
    vf_coef: float = 0.5
    """weight of the value loss, in [0, inf)"""
    max_grad_norm: float = 0.5
    """largest norm of the joint gradient, in (0, inf]"""
    target_kl: float | None = None
    """stop the epochs of a rollout once the approximate KL divergence exceeds this, in (0, inf); default: never"""
    separate_trunks: bool = False
    """a convolutional network of its own for the critic, as BLPO needs it"""


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


# ---- PPO's value loss ------------------------------------------------------------------------------------------
def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Half the mean squared error of the values (n,); with clip_coef the larger of it and of the same error after
    the change from old_values has been clipped to +-clip_coef (OpenAI baselines)."""
    errors = (values - returns) ** 2
    if clip_coef is not None:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        errors = torch.max(errors, (clipped - returns) ** 2)
    return 0.5 * errors.mean()


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
    """Raise BadInput unless the minibatches divide a rollout."""
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        raise BadInput(
            f"--num-minibatches {args.num_minibatches} does not divide num-envs x num-steps = {batch_size}; "
            f"{nearest_divisors(batch_size, args.num_minibatches)} would"
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
    agent = Agent(num_actions, args.separate_trunks, args.bf16).to(device, memory_format=torch.channels_last)
    if args.compile:
        for trunk in {agent.actor_trunk, agent.critic_trunk}:
            trunk.forward = torch.compile(trunk.forward)
    critic_lr = args.critic_learning_rate or args.learning_rate
    groups = (agent.actor_parameters(), args.learning_rate), (agent.critic_parameters(), critic_lr)
    optimiser = torch.optim.Adam([{"params": parameters, "lr": lr} for parameters, lr in groups], eps=1e-5, fused=True)
    optimisers = [optimiser]

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
            rows = b_valid.flatten().nonzero().squeeze(-1)  # transitions; the row after an end is none
            arrays = (obs[:-1], b_actions, logprobs, advantages, values[:-1], returns)
            transitions = [array.flatten(0, 1).index_select(0, rows) for array in arrays]
            num_minibatches = max(1, min(args.num_minibatches, len(rows) // 2))
            for epoch in range(args.update_epochs):
                statistics = []  # of each minibatch of this epoch; read once, after the update
                for indices in torch.randperm(len(rows)).to(device).tensor_split(num_minibatches):
                    mb_obs, mb_actions, mb_logprobs, mb_advantages, mb_values, mb_returns = (
                        array.index_select(0, indices) for array in transitions
                    )
                    images = pixels(mb_obs)
                    features = agent.encode(agent.actor_trunk, images)
                    new_logprobs, entropy = agent.logprob_and_entropy(features, mb_actions)
                    logratio = new_logprobs - mb_logprobs
                    ratio = logratio.exp()
                    if args.norm_adv and len(mb_advantages) > 1:
                        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                    policy_loss = -clipped_surrogate(ratio, mb_advantages, args.clip_coef).mean()
                    if args.separate_trunks:
                        features = agent.encode(agent.critic_trunk, images)
                    new_values = agent.critic_head(features).squeeze(-1)
                    vloss_clip = args.clip_coef if args.clip_vloss else None
                    critic_loss = value_loss(new_values, mb_values, mb_returns, vloss_clip)
                    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * critic_loss
                    optimiser.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimiser.step()
                    if epoch == args.update_epochs - 1 or args.target_kl is not None:
                        with torch.no_grad():
                            clipped = ((ratio - 1).abs() > args.clip_coef).float().mean()
                            kl = ((ratio - 1) - logratio).mean()
                            statistics.append(
                                torch.stack([critic_loss, policy_loss, entropy, -logratio.mean(), kl, clipped])
                            )
                if args.target_kl is not None and torch.stack(statistics)[:, 4].mean() > args.target_kl:
                    break
            names = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
            losses = dict(zip((f"losses/{name}" for name in names), torch.stack(statistics).mean(0).tolist()))

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
