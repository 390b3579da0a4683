"""SoBiRL (Yang et al. 2025, arXiv:2405.19697, Alg. 5) on Atari: a reward from comparisons of clips.

The sibling of sobirl_rlhf.py. Upper level: theta, the weights of a reward network r, which is fitted to a
teacher's choices between pairs of fragments. Lower level: the policy pi*(theta) that discrete soft
actor-critic (SAC, Christodoulou 2019) fits to that reward. theta's gradient counts in that pi* changes:

    min_theta E[l(d_1, d_2; theta)],  d_1, d_2 ~ pi*(theta)
    l = -y log p - (1 - y) log(1 - p),  p = sigma(R(d_1) - R(d_2)),  R(d) = sum_h r(s_h, a_h)
                                                   eq. (11), (101)     -> cross_entropies
    grad = E[grad l]                               eq. (12), explicit
         + E[l sum_h (grad Q* - grad V*)(s_h, a_h)] / alpha            eq. (13) -> implicit_term
    grad Q*(s, a), grad V*(s) = E_pi*[sum_t gamma^t grad r(s_t, a_t)]  Prop. 5.1, from (s, a), from s

with SAC's temperature alpha. `--reward-update` names the method, see sobirl_rlhf.py. `--implicit one-step`,
as released, cuts Prop. 5.1's sums after one term and takes V's expectation over the actions exactly ->
one_step_advantages; rollouts, those of Stoc-SoBiRL (79), start from copies of the game -> CloneableGames
(`--env-backend gymnasium`).

EnvPool plays the games by default; a lost life is a termination for both levels, returns are the points
of whole games. A replay of 1,000,000 frames takes 7.1 GB: each is kept once. Departures from the released
code: pixels are scaled once; the reward network is in evaluation mode outside its own training; (13) is
over the policy's newest pairs, with a baseline, in one reward step for each theta that the policy
answers, and in all of them with --implicit-pairs newest-every-step; 1 / alpha and the norm of (13)'s
gradient are limited; both levels see the same bounded reward. docs/sobirl.md numbers the details.

    python sobirl_rlhf_atari.py --env-id BeamRider-v5 --reward-update sobirl
"""

# ---- Imports -----------------------------------------------------------------------------------------
import argparse
import contextlib
import copy
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
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

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
    """The run, the game, the lower level, then the upper level."""

    exp_name: str = Path(__file__).stem
    """name of the experiment"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """seed of the games, the initial weights, the actions, the minibatches and the teacher"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto: cuda if there is one"""
    torch_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """PyTorch's threads on a CPU; 0: one for each usable core, far too many where other programs keep these
    busy; the number changes rounding"""
    cuda_graphs: bool = False
    """launch an update of the lower level on CUDA as one graph"""
    bf16: bool = False
    """bfloat16 in the networks of the lower level's updates"""
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
    """games played at the end with actions drawn from the policy"""
    capture_video: bool = False
    """film one such game"""

    env_id: str = "BeamRider-v5"
    """an Atari game by its name in EnvPool; ALE/Seaquest-v5 and SeaquestNoFrameskip-v4 mean Seaquest-v5"""
    env_kwargs: Annotated[str, pydantic.AfterValidator(json_object)] = "{}"
    """more options of EnvPool's Atari games, as JSON: '{"max_episode_steps": 5000}'; not with gymnasium"""
    env_backend: Literal["envpool", "gymnasium"] = "envpool"
    """who plays the training's games: EnvPool, or Gymnasium (pip install ale-py), slower, but a game can be
    copied as rollouts and hpgd-style need it"""
    env_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """EnvPool threads; 0: one for each usable core, at most num_envs"""
    episodic_life: bool = True
    """a lost life is a termination for the learner; logged returns are of whole games all the same"""
    clip_reward: bool = True
    """learner and teacher see the sign of the points; logged returns are points all the same"""
    repeat_action_probability: Fraction = 0.0
    """probability that the game takes the last action again (sticky actions)"""
    total_timesteps: PositiveInt = 4_000_000
    """environment steps of 4 frames in all, rounded down to whole iterations; the paper's for BeamRider,
    1,000,000 for Seaquest and SpaceInvaders"""
    num_envs: Annotated[int, Field(ge=1, le=1024)] = 1
    """parallel games"""
    num_steps: AtLeastTwo = 10_000
    """steps of each game between two reward updates"""

    gamma: BelowOne = 0.99
    """discount factor"""
    buffer_size: PositiveInt = 1_000_000
    """transitions kept for replay, 7.1 KB each"""
    batch_size: PositiveInt = 64
    """transitions in a minibatch"""
    learning_starts: NonNegativeInt = 20_000
    """uniformly random steps at first, rounded up to whole iterations, at least one"""
    learning_rate: PositiveFloat = 1e-4
    """Adam step size of actor, critics and temperature at first"""
    anneal_steps: PositiveOrInf = 8e6
    """environment steps after which it would have fallen linearly to 0; inf: it stays"""
    train_frequency: PositiveInt = 4
    """transitions from one update to the next"""
    target_frequency: PositiveInt = 8000
    """transitions from one copy of the critics into the target critics to the next"""
    autotune: bool = True
    """adapt the temperature to the target entropy"""
    alpha: Annotated[float, Field(ge=1e-30, le=1e30)] = 1.0
    """temperature at first, or throughout with --no-autotune"""
    target_entropy: Fraction = 0.89
    """target entropy, as a fraction of the uniform policy's, log A"""

    reward_update: Literal[*LEARNED, "ground-truth", "constant", "frozen"] = "sobirl"
    """how the reward is learned; or the true one; or a control: 1 everywhere, a random network"""
    permute_cross_entropy: bool = False
    """a control for sobirl and hpgd-style: the implicit term gets another pair's cross-entropy"""
    reward_bound: Literal["tanh", "clip"] = "tanh"
    """what keeps the reward in [-1, 1] at both levels: clip as released; tanh is smooth (Assumption 7.3)"""
    reward_ensemble: PositiveInt = 1
    """reward networks; the reward is their mean"""
    reward_candidates: PositiveInt = 1
    """pairs drawn for each that is asked after the random steps; of all drawn, those are asked on which the
    networks disagree most (10 in B-Pref)"""
    reward_model: Path | None = None
    """checkpoint.pt whose reward network is the initial one; --reward-update frozen keeps it"""
    reward_dropout: BelowOne = 0.5
    """dropout rate after each convolution while the reward learns"""
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
    warmup_epochs: NonNegativeInt = 512
    """passes over them by the cross-entropy alone (512 with dropout as released)"""
    pairs_per_iteration: NonNegativeInt | None = None
    """labels of an iteration after that; default: what is left of the budget, evenly over the run"""
    heldout_pairs: PositiveInt = 64
    """unlabelled pairs of an iteration for the logged accuracy, cross-entropy and correlation"""
    teacher: Literal["oracle", "stochastic", "mistake", "skip", "equal", "myopic", "human"] = "oracle"
    """who labels (Lee et al. 2021, B-Pref); oracle: the higher true return wins, the paper's rule;
    stochastic as released; human: people, through label_preferences.py"""
    wait_for_labels: bool = True
    """wait until people have answered all of an iteration's pairs; else go on with what is there"""
    labels: Path | None = None
    """labels.jsonl of people: the queue starts with its pairs, but each tenth is held out to measure the
    accuracy; only --teacher human is asked for more"""

    implicit: Literal["one-step", "rollouts"] = "one-step"
    """how sobirl estimates grad Q and grad V: as released, or by Stoc-SoBiRL's rollouts"""
    implicit_pairs: Literal["newest", "newest-every-step", "queue"] = "newest"
    """pairs of what is added: the newest, at most reward_batch_size, in an iteration's first reward step;
    these in every step, as in the paper; for sobirl also those of each step's own minibatch, as released"""
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
        if self.buffer_size < rows:
            raise BadInput(f"--buffer-size {self.buffer_size} is less than one iteration of {rows}")
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
        if (self.implicit == "rollouts" or method == "hpgd-style") and self.env_backend == "envpool":
            raise BadInput("--env-backend envpool cannot copy a game, as rollouts need it; use gymnasium")
        if self.env_backend == "gymnasium" and json.loads(self.env_kwargs):
            raise BadInput("--env-kwargs are EnvPool's: leave them out with --env-backend gymnasium")
        if self.labels and self.teacher != "human" and method in ADDS:
            raise BadInput(
                f"--labels: a file has no newest pairs, as {method} needs; use drlhf or a human teacher"
            )
        if self.teacher == "human" and (self.implicit == "rollouts" or method == "hpgd-style"):
            raise BadInput("--teacher human has no rollouts: the games of its pairs are not kept")
        if self.reward_candidates > self.reward_ensemble == 1:
            raise BadInput("--reward-candidates: one network cannot disagree; raise --reward-ensemble")
        return self


METRICS = (
    "global_step", "wall_time_s", "charts/episodic_return", "charts/episodic_length", "charts/SPS",
    "losses/qf_loss", "losses/qf_values", "losses/actor_loss", "losses/entropy", "losses/alpha",
    "losses/cross_entropy", "bilevel/labels", "bilevel/true_reward", "bilevel/implicit_weight",
    "bilevel/implicit_ratio", "bilevel/score_mean", "bilevel/simulator_steps", "bilevel/heldout_accuracy",
    "bilevel/heldout_cross_entropy", "bilevel/reward_correlation", "bilevel/learned_reward",
    "bilevel/label_accuracy", "time/env", "time/policy", "time/update", "time/reward",
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


# ---- Games that can be copied ------------------------------------------------------------------------
def area_weights(size: int) -> np.ndarray:
    """(84, size): means over 84 equal parts of `size` pixels; a pixel on a border counts by its share
    (OpenCV's INTER_AREA)."""
    edges = np.arange(85)[:, None] * size / 84
    return np.diff(np.clip(edges - np.arange(size), 0, 1), axis=0) * 84 / size


class GameState(NamedTuple):
    """All that a game's future depends on: emulator, images (4, 84, 84), steps so far, and how its last step
    ended: 0 not, 1 with a lost life, 2 with the game's end or a cut."""

    emulator: object
    images: np.ndarray
    steps: int = 0
    ended: int = 2


class CloneableGames(gym.vector.VectorEnv):
    """The games of `make_envs`, with its preprocessing and its flags, by Gymnasium.

    One emulator plays all of them in turn, and `games` holds the state of each: whoever puts another one
    there goes on from it, which makes this the generative model of Algorithm 3.
    """

    def __init__(self, args, num_envs: int, seed: int):
        options = {"obs_type": "grayscale", "frameskip": 1, "max_num_frames_per_episode": None}
        with task_errors(args.env_id):
            import ale_py

            ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
            gym.register_envs(ale_py)
            options |= {"repeat_action_probability": args.repeat_action_probability}
            self.env = gym.make(f"ALE/{game_name(args.env_id)}", **options).unwrapped
            self.env.reset(seed=seed)
        self.args, self.random = args, np.random.default_rng(seed)
        self.rows, self.columns = area_weights(210), area_weights(160).T
        self.games = [GameState(self.env.clone_state(), np.zeros((4, 84, 84), np.uint8))] * num_envs

    def reset(self, **ignored) -> tuple[np.ndarray, dict]:
        """First images (N, 4, 84, 84) of new games."""
        self.games = [game._replace(ended=2) for game in self.games]
        return self.step(np.zeros(len(self.games)))[0], {}

    def advance(self, game: GameState, actions: list[int]) -> tuple[GameState, float, bool]:
        """The game after a frame of each action, its points, and whether it is over."""
        points, screens, over = 0.0, [], False
        for action in actions:
            screen, reward, over, *_ = self.env.step(action)
            points += float(reward)
            screens = [*screens[-1:], screen]
        image = self.rows @ np.maximum(screens[0], screens[-1]) @ self.columns + 0.5
        images = np.concatenate([game.images[1:], image[None].astype(np.uint8)])
        return GameState(self.env.clone_state(), images, game.steps, 0), points, over

    def step_game(self, game: GameState, action: int) -> tuple[GameState, float, bool, bool, bool]:
        """The game after a step, the points won, whether a life was lost, the game is over, or cut off."""
        self.env.restore_state(game.emulator)
        if game.ended == 2:
            self.env.reset()
            game = game._replace(steps=0)
        if game.ended:
            for _ in range(self.random.integers(30)):
                self.env.step(0)
            new, *_ = self.advance(game, [int("FIRE" in self.env.get_action_meanings())])
            first = np.repeat(new.images[-1:], 4, 0)
            return new._replace(images=first if game.ended == 2 else new.images), 0.0, False, False, False
        lives, steps = self.env.ale.lives(), game.steps + 1
        new, points, over = self.advance(game, [action] * 4)
        life, cut = over or self.env.ale.lives() < lives, not over and steps >= 27_000
        life = life if self.args.episodic_life else over
        return new._replace(steps=steps, ended=2 if over or cut else int(life)), points, life, over, cut

    def step(self, actions: np.ndarray) -> tuple:
        """As the games of `make_envs`."""
        found = [self.step_game(game, int(action)) for game, action in zip(self.games, actions)]
        self.games, *columns = ([*column] for column in zip(*found))
        points, lives, over, cut = (np.array(column) for column in columns)
        reward = np.sign(points) if self.args.clip_reward else points
        images = np.stack([game.images for game in self.games])
        return images, reward, lives, cut, {"reward": points, "terminated": over}


# ---- Networks ----------------------------------------------------------------------------------------
def nature_cnn(outputs: int, channels: tuple[int, ...] = (32, 64, 64), width: int = 512) -> nn.Sequential:
    """The network of Mnih et al. 2015: images (n, 4, 84, 84) in [0, 1] -> (n, outputs). As in CleanRL and as
    released: no ReLU after the last convolution, weights by Kaiming He's rule, zero biases."""
    a, b, c = channels
    layers = [nn.Conv2d(4, a, 8, 4), nn.ReLU(), nn.Conv2d(a, b, 4, 2), nn.ReLU(), nn.Conv2d(b, c, 3)]
    layers += [nn.Flatten(), nn.Linear(c * 7 * 7, width), nn.ReLU(), nn.Linear(width, outputs)]
    for layer in layers:
        if hasattr(layer, "weight"):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def pixels(obs: Tensor) -> Tensor:
    """Grey values 0..255 (n, 4, 84, 84) as floats in [0, 1], channels last in memory: the one place that
    scales them."""
    return obs.contiguous(memory_format=torch.channels_last) * (1 / 255)


def outputs(network: nn.Module, obs: Tensor) -> Tensor:
    """What a network says (..., A) of raw observations (..., 4, 84, 84)."""
    return network(pixels(obs.flatten(0, -4))).unflatten(0, obs.shape[:-3])


def taken(values: Tensor, actions: Tensor) -> Tensor:
    """Of values (..., A) those of the actions (...)."""
    return values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


class Agent(nn.Module):
    """SAC's networks: a categorical actor, the softmax of its logits, two critics with a value for each
    action, their copies, the log temperature.

    All may be any modules from images (n, 4, 84, 84) in [0, 1] to (n, A). Called with raw observations, the
    agent is the policy as it is played.
    """

    def __init__(self, num_actions: int):
        super().__init__()
        self.actor = nature_cnn(num_actions)
        self.critics = nn.ModuleList(nature_cnn(num_actions) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions (n,) at raw observations (n, 4, 84, 84) with Gumbel noise (n, A): the largest sum of logit
        and noise is a sample of the softmax (Maddison et al. 2014)."""
        return (outputs(self.actor, obs) + noise).argmax(-1)

    def forward(self, raw_obs: Tensor) -> Tensor:
        """The policy as it is played: raw observations (..., 4, 84, 84), or flat ones (..., 28224) ->
        actions (...), drawn: the most probable ones get stuck in a game that waits for FIRE."""
        obs = torch.as_tensor(raw_obs)
        shape = obs.shape[:-3] if obs.shape[-1] == 84 else obs.shape[:-1]
        probabilities = outputs(self.actor, obs.reshape(-1, 4, 84, 84)).softmax(-1)
        return torch.multinomial(probabilities, 1).view(shape)


class RewardNetwork(nn.Module):
    """r_theta(s, .) in [-1, 1], the reward that both levels see, for all actions: four convolutions of 16
    channels with batch norm and dropout (app. J.2). Images (n, 4, 84, 84) in [0, 1] -> rewards (n, A)."""

    def __init__(self, num_actions: int, dropout: float = 0.5, bound: str = "tanh", channels: int = 16):
        super().__init__()
        layers, inputs, self.bound = [], 4, bound
        for kernel, stride in ((7, 3), (5, 2), (3, 1), (3, 1)):
            layers += [nn.Conv2d(inputs, channels, kernel, stride), nn.BatchNorm2d(channels)]
            layers += [nn.LeakyReLU(), nn.Dropout(dropout)]
            inputs = channels
        head = nn.Linear(channels * 7 * 7, 64), nn.LeakyReLU(), nn.Linear(64, num_actions)
        self.network = nn.Sequential(*layers, nn.Flatten(), *head)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        raw = self.network(images)
        return raw.tanh() if self.bound == "tanh" else raw.clamp(-1, 1)


class RewardEnsemble(nn.ModuleList):
    """Reward networks with initial weights of their own, which learn from the same minibatches, each by its
    own cross-entropy."""

    def forward(self, images: Tensor) -> Tensor:
        """The mean of their rewards."""
        return torch.stack([member(images) for member in self]).mean(0)


# ---- Lower level: discrete soft actor-critic ---------------------------------------------------------
def action_values(critics: nn.ModuleList, images: Tensor) -> Tensor:
    """Q_j(s, .) of both critics (2, B, A)."""
    return torch.stack([critic(images) for critic in critics])


def soft_values(values: Tensor, logits: Tensor, alpha: Tensor) -> Tensor:
    """V(s) = sum_a pi(a|s) (min_j Q_j(s, a) - alpha log pi(a|s)) (B,) (Christodoulou 2019, eq. 10): values
    (2, B, A), logits (B, A)."""
    logprobs = logits.log_softmax(-1)
    return (logprobs.exp() * (values.amin(0) - alpha * logprobs)).sum(-1)


def critic_targets(rewards: Tensor, terminated: Tensor, next_soft_values: Tensor, gamma: float) -> Tensor:
    """r + gamma (1 - terminated) V(s') (B,). A time limit is no termination."""
    return rewards + gamma * (1 - terminated) * next_soft_values


def critic_loss(values: Tensor, actions: Tensor, targets: Tensor) -> Tensor:
    """Sum over both critics of the mean squared error at the taken actions (B,): values (2, B, A)."""
    return ((taken(values, actions.expand(2, -1)) - targets) ** 2).mean(1).sum()


def actor_loss(values: Tensor, logits: Tensor, alpha: Tensor) -> Tensor:
    """Mean over states and, as released, actions of pi (alpha log pi - min_j Q_j), through pi alone."""
    return -soft_values(values.detach(), logits, alpha).mean() / logits.shape[-1]


def temperature_loss(log_alpha: Tensor, entropies: Tensor, fraction: float, num_actions: int) -> Tensor:
    """alpha (mean entropy - fraction log A) / A (Haarnoja et al. 2018b, eq. 18); no gradient enters pi."""
    excess = entropies.detach().mean() - fraction * math.log(num_actions)
    return log_alpha.exp() * excess / num_actions


def descend(optimiser: torch.optim.Optimizer, gradients: tuple[Tensor, ...]) -> None:
    """One step of the optimiser, with these gradients of its parameters."""
    for parameter, gradient in zip(optimiser.param_groups[0]["params"], gradients):
        parameter.grad = gradient
    optimiser.step()


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


# ---- Replay ------------------------------------------------------------------------------------------
def stacks(frames: Tensor) -> Tensor:
    """Observations (..., L, 4, 84, 84) in consecutive frames (..., L + 3, 84, 84), without a copy."""
    return frames.unfold(-3, 4, 1).movedim(-1, -3)


class Replay:
    """The newest steps of N games. Row t holds the newest frame of what was seen before step t, as bytes and
    once, how many frames of the same game come before it (at most 3), the action, the reward, whether that
    terminated, and whether the step was a transition: a reset, and the first row of a process, is none.
    """

    def __init__(self, size: int, num_envs: int):
        self.size, self.added, self.transitions = size + 4, 0, 0  # the newest row has no action yet
        self.oldest = 0  # row from which on steps can be drawn
        self.frames = torch.zeros(self.size, num_envs, 84, 84, dtype=torch.uint8)
        kinds = torch.uint8, torch.uint8, torch.float32, torch.bool, torch.bool
        small = [torch.zeros(self.size, num_envs, dtype=kind) for kind in kinds]
        self.ages, self.actions, self.rewards, self.terminated, self.valid = small
        self.columns = self.frames, *small

    def add(self, actions, rewards, terminated, valid, images, begun) -> None:
        """Finish the newest row, and begin the next by the images (N, 4, 84, 84) that came of it; begun (N,):
        by a game's first."""
        now, new = self.added % self.size, (self.added + 1) % self.size
        for column, each in zip(self.columns[2:], (actions, rewards, terminated, valid)):
            column[now] = torch.as_tensor(each)
        self.frames[new] = torch.as_tensor(images)[:, 3]
        self.ages[new] = torch.where(torch.as_tensor(begun), 0, (self.ages[now] + 1).clamp(max=3))
        self.added, self.transitions = self.added + 1, self.transitions + int(valid.sum())
        self.oldest = max(self.oldest, self.added - self.size + 4)  # with the three rows before it

    def history(self, steps: Tensor, games: Tensor, count: int) -> Tensor:
        """`count` frames (..., count, 84, 84) from three before row `steps` (...) of `games` (...) on. What
        would come before the game has its first frame, as the observations then have."""
        ages = self.ages[steps % self.size, games].long().unsqueeze(-1)
        rows = steps.unsqueeze(-1) + torch.arange(-3, count - 3).maximum(-ages)
        return self.frames[rows % self.size, games.unsqueeze(-1)]

    def sample(self, count: int) -> list[Tensor]:
        """Transitions drawn with replacement: frames (count, 5, 84, 84), the first four of which are the
        observation and the last four the next one, actions, rewards, terminated (count,)."""
        steps = torch.randint(self.oldest, self.added, (4 * count,))
        games = torch.randint(self.frames.shape[1], (4 * count,))
        kept = self.valid[steps % self.size, games].nonzero().squeeze(-1)[:count]  # two resets never meet
        steps, games = steps[kept], games[kept]
        actions, rewards, terminated = (each[steps % self.size, games] for each in self.columns[2:5])
        return [self.history(steps, games, 5), actions.long(), rewards, terminated.float()]

    def state_dict(self) -> dict:
        """The rows that are there, without a copy of them."""
        rows = min(self.size, self.added + 1)
        columns = [torch.from_numpy(column[:rows].numpy()) for column in self.columns]
        return {"counts": (self.added, self.transitions, self.oldest), "columns": columns}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`; the size may have changed."""
        self.added, self.transitions, oldest = state["counts"]
        self.oldest = max(oldest, self.added - self.size + 4)
        rows = len(state["columns"][0])
        for steps in torch.arange(max(0, self.added + 1 - min(rows, self.size)), self.added + 1).split(1000):
            for column, saved in zip(self.columns, state["columns"], strict=True):
                column.index_copy_(0, steps % self.size, saved[steps % rows])  # never spreads one game


def check_room(args: Args) -> None:
    """Say how much memory replay and queue take, and raise BadInput unless the memory holds them."""
    rows = min(args.buffer_size, args.total_timesteps) + 4 * args.num_envs
    sizes = rows * (84 * 84 + 8), args.queue_size * 2 * (args.fragment_length + 3) * 84 * 84
    replay, pairs = (f"{1e-9 * size:,.1f} GB" for size in sizes)
    needs = f"{replay} for the replay, up to {pairs} for labelled pairs"
    say(f"memory: {needs}; as much in checkpoint.pt, which a new one lies beside while it is written")
    if sum(sizes) > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
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


# ---- Upper level: advantages -------------------------------------------------------------------------
def one_step_advantages(rewards: Tensor, actions: Tensor, logits: Tensor) -> Tensor:
    """Q - V (...) with Prop. 5.1's sums cut after one term, as released: r(s, a) - sum_b pi(b|s) r(s, b).

    rewards and logits (..., A), actions (...). It is 0 where r does not depend on the action.
    """
    return taken(rewards, actions) - (logits.softmax(-1) * rewards).sum(-1)


def gumbel(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Gumbel noise."""
    return -torch.empty(shape).exponential_(generator=generator).log()


def roll_out(agent, envs, lengths: Tensor, decay: float, obs, actions=None, generator=None) -> list[Tensor]:
    """Rollouts (eq. 78) of `lengths` (R,) steps, or to a life's end, of R games with observations obs
    (R, 4, 84, 84): with first actions (R,), or with the policy's own.

    Returns observations (R, T, 4, 84, 84), actions (R, T) and weights (R, T): decay^t, 0 after the end.
    """
    device, going, rows = agent.log_alpha.device, np.ones(len(lengths), dtype=bool), []
    num_actions = agent.actor(torch.zeros(1, 4, 84, 84, device=device)).shape[1]
    for t in range(int(lengths.max())):
        obs, noise = torch.as_tensor(obs), gumbel(len(lengths), num_actions, generator=generator)
        chosen = agent.act(obs.to(device), noise.to(device)).cpu() if t or actions is None else actions
        rows.append((obs, chosen, decay**t * (torch.from_numpy(going) & (lengths > t))))
        obs, _, ended, cut, _ = envs.step(chosen.numpy())
        going = going & ~(ended | cut)
    return [torch.stack(column, 1) for column in zip(*rows)]


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

        # ---- Training: agents, reward, replay --------------------------------------------------------
        make_games = CloneableGames if args.env_backend == "gymnasium" else make_envs
        if args.env_backend == "gymnasium":
            envs.close()
            envs = make_games(args, args.num_envs, derived_seed(args.seed, start))
        check_room(args)
        pbrl, length = args.reward_update == "pbrl-style", args.fragment_length
        copying = args.implicit == "rollouts" or args.reward_update == "hpgd-style"
        agent_sizes = (num_actions,)
        agents = [Agent(*agent_sizes) for _ in range(2 if pbrl else 1)]  # the second one tracks pi*
        agent, reward_sizes = agents[0], (num_actions, args.reward_dropout, args.reward_bound)
        model = RewardEnsemble(RewardNetwork(*reward_sizes) for _ in range(args.reward_ensemble))
        for each in (*agents, model):
            each.to(device, memory_format=torch.channels_last).eval()
        optimisers = [torch.optim.AdamW(model.parameters(), args.reward_learning_rate, fused=True)]
        step_size = torch.tensor(args.learning_rate, device=device)  # a CUDA graph may hold it
        for each in agents:
            trained = [*each.actor.parameters(), *each.critics.parameters()]
            trained += [each.log_alpha] * args.autotune
            optimisers.append(torch.optim.Adam(trained, step_size, eps=1e-4, fused=True, capturable=True))
        replay = Replay(min(args.buffer_size, args.total_timesteps) // args.num_envs, args.num_envs)
        kept = {"agent": agent, "tracker": agents[-1], "reward": model, "replay": replay}
        kept |= {f"optimiser_{k}": each for k, each in enumerate(optimisers)}
        queue: list[tuple[Tensor, ...]] = []  # frames (2, L + 3, 84, 84), actions (2, L) and label of a pair
        asked = fresh = simulated = 0  # labels; those of the last iteration, if the policy's; rollouts' steps
        fragments = 2, length + 3, 84, 84
        given, taken_up = [], set()  # people's pairs that are held out; the numbers of those in the queue
        try:
            if args.reward_model and not checkpoint:
                saved = torch.load(args.reward_model, map_location="cpu", weights_only=True)
                if game_name(saved["env_id"]) != game_name(args.env_id):
                    raise ValueError(f"the network is of {saved['env_id']}")
                model.load_state_dict(saved["reward"])
            if args.labels:
                for each, label in zip(*labelled_pairs(args.labels, set())):
                    if game_name(each["env_id"]) != game_name(args.env_id):
                        raise ValueError(f"pair {each['pair']} is of {each['env_id']}")
                    pair = each["frames"].view(fragments), each["actions"], label
                    (given if each["pair"] % 10 == 9 else queue).append(pair)
                if not queue:
                    raise ValueError("no label is there")
            if checkpoint:
                for name, each in kept.items():
                    each.load_state_dict(checkpoint.pop(name))  # the replay is in memory once
                (queue, asked, fresh, simulated), taken_up = checkpoint["upper"], set(checkpoint["taken"])
                torch.set_rng_state(checkpoint["rng"])  # all that is random is drawn on the CPU, but dropout
                queue = [(frames.view(fragments), *others) for frames, *others in queue]
        except Exception as error:  # a damaged archive raises errors of many kinds
            given_files = {"labels": args.labels, "reward-model": args.reward_model, "resume": args.resume}
            files = " or ".join(f"--{name} {path}" for name, path in given_files.items() if path)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BadInput(f"{files}: of another game, sizes or version, or damaged: {reason}") from error
        for each in optimisers:
            each.param_groups[0]["lr"] = each.defaults["lr"]  # it may have been given again
        for each in agents:
            if not (checkpoint and args.autotune):
                nn.init.constant_(each.log_alpha, math.log(args.alpha))

        # ---- Training: the updates -------------------------------------------------------------------
        def columns_of(pairs: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
            """Observations (P, 2, L, 4, 84, 84), actions (P, 2, L) and labels (P,) of pairs."""
            frames, actions, labels = (torch.stack(column).to(device) for column in zip(*pairs))
            return stacks(frames), actions, labels

        def rewards_of(network: nn.Module, obs: Tensor, actions: Tensor) -> Tensor:
            """r(s, a) (...) at raw observations (..., 4, 84, 84) and actions (...)."""
            return taken(outputs(network, obs.to(device)), actions.to(device))

        @torch.autocast(device.type, torch.bfloat16, args.bf16, cache_enabled=False)
        def update_lower(*minibatch: Tensor) -> dict[str, Tensor]:
            """One Adam step of each agent by `Replay.sample`. The actor's loss takes the critics as they are,
            so one backward pass serves all. Returns what is logged of the agent that acts."""
            frames, actions, rewards, terminated = minibatch
            obs, next_obs = pixels(frames[:, :4]), pixels(frames[:, 1:])
            if args.reward_update == "constant":
                rewards = torch.ones_like(rewards)
            elif args.reward_update != "ground-truth":
                with torch.no_grad():
                    rewards = taken(model(obs), actions)  # by the newest theta, in evaluation mode
            for each, optimiser in zip(reversed(agents), reversed(optimisers)):
                alpha = each.log_alpha.detach().exp()
                with torch.no_grad():
                    following = action_values(each.targets, next_obs), each.actor(next_obs)
                    targets = critic_targets(rewards, terminated, soft_values(*following, alpha), args.gamma)
                values, logits = action_values(each.critics, obs), each.actor(obs)
                errors, loss = critic_loss(values, actions, targets), actor_loss(values, logits, alpha)
                entropies = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
                own = temperature_loss(each.log_alpha, entropies, args.target_entropy, num_actions)
                extra = policy_term() if pbrl and fresh and each is agent else 0.0
                total = errors + loss + own + extra
                descend(optimiser, torch.autograd.grad(total, optimiser.param_groups[0]["params"]))
            found = {"qf_loss": errors, "qf_values": values, "actor_loss": loss, "entropy": entropies}
            return {f"losses/{name}": value.detach() for name, value in found.items()}

        def policy_term() -> Tensor:
            """What pbrl-style adds to the acting policy's loss, from the pairs of the last iteration."""
            obs, actions, labels = columns_of(queue[-fresh:])
            with torch.no_grad():
                losses = cross_entropies(rewards_of(model, obs, actions), labels)
            logprobs = taken(outputs(agent.actor, obs).log_softmax(-1), actions)
            return pbrl_policy_term(losses, logprobs, args.pbrl_penalty, args.gamma)

        def make_rollouts(times: Tensor, games: Tensor, actions: Tensor) -> list[list[Tensor]]:
            """The two sets of rollouts of the added term: pbrl-style's of both actors from new games, the
            others' from the states of pairs (P, 2, L), with the visited actions and with the policy's own."""
            repeats, found, kept = args.rollouts or (10 if pbrl else 1), [], envs.games if copying else None
            if pbrl:
                seed = derived_seed(args.seed, 2**42 + global_step)
                for each in (agents[1], agent):  # same starts and noise: equal actors have no penalty
                    others, generator = make_games(args, repeats, seed), torch.Generator().manual_seed(seed)
                    lengths = torch.full((repeats,), args.rollout_length or 200)
                    settings = lengths, args.gamma, others.reset()[0], None, generator
                    found.append(roll_out(each, others, *settings))
                    others.close()
                return found
            geometric, decay = args.reward_update == "hpgd-style", args.gamma
            if geometric:  # one step of each fragment
                steps = torch.randint(length, (len(times), 2, 1))
                times, games, actions = (each.gather(2, steps) for each in (times, games, actions))
            where = zip(times.flatten().tolist(), games.flatten().tolist())
            states = [copies[t][game] for t, game in where for _ in range(repeats)]
            for first in (actions.flatten().repeat_interleave(repeats), None):
                lengths = torch.full((len(states),), args.rollout_length or 10)
                if geometric:
                    lengths, decay = geometric_lengths(len(states), args.gamma), math.sqrt(args.gamma)
                envs.games = states
                images = np.stack([state.images for state in states])
                found.append(roll_out(agent, envs, lengths, decay, images, first))
            envs.games = kept
            return found

        def added_term(pairs: list, rollouts: list[list[Tensor]], shift: int) -> tuple[Tensor, Tensor]:
            """What sobirl, hpgd-style or pbrl-style add to the mean cross-entropy, from these pairs and these
            rollouts; and the mean of the pairs' scores."""
            sums = []
            for obs, actions, discounts in rollouts:
                sums.append((rewards_of(model, obs, actions) * discounts.to(device)).sum(-1))
            if pbrl:
                return pbrl_term(*sums, weight), torch.tensor(math.nan)
            obs, actions, labels = columns_of(pairs)
            rewards = outputs(model, obs)
            if rollouts:
                shape = len(pairs), 2, -1, args.rollouts or 1
                advantages = rollout_advantages(*(each.view(shape) for each in sums))
            else:
                with torch.no_grad():
                    logits = outputs(agent.actor, obs)
                advantages = one_step_advantages(rewards, actions, logits)
            # The sum over both fragments; hpgd-style has one step of each, which stands for all.
            scores = 2 * length * advantages.mean((1, 2))
            losses = cross_entropies(taken(rewards, actions), labels)
            return implicit_term(losses, scores, weight, args.baseline, shift).mean(), scores.detach().mean()

        update: Callable = update_lower  # the number of pbrl-style's pairs varies, and no graph can
        if device.type == "cuda" and args.cuda_graphs and not pbrl:
            update = GraphedUpdate(update_lower)
        warnings.filterwarnings("ignore", "This instance was constructed with capturable")

        # ---- Training: buffers and the loop ----------------------------------------------------------
        shape, none = (args.num_steps, args.num_envs), np.zeros(args.num_envs)
        numbers = torch.meshgrid(*map(torch.arange, shape), indexing="ij")  # step and game of each row
        ended = over = none.astype(bool)  # a life or a game, or a game, in the last step; a reset follows
        game_points, game_lengths = np.zeros((2, args.num_envs))
        num_iterations = args.total_timesteps // batch_size
        warmup_iterations = max(1, math.ceil(args.learning_starts / batch_size))
        uses_labels = args.reward_update in LEARNED
        has_network = uses_labels or args.reward_update == "frozen"
        human = uses_labels and args.teacher == "human"
        run.open()
        people = run.folder / "preferences"
        if human:
            say(f"label with: python label_preferences.py {run.folder}")
        obs = torch.tensor(envs.reset()[0])
        replay.add(none, none, none, none, obs, ~ended)
        logged: dict[str, Tensor] = {}
        for iteration in range(start // batch_size + 1, num_iterations + 1):
            iteration_start, env_time, update_time, episodes = time.perf_counter(), 0.0, 0.0, []
            learning, global_step, copies = iteration > warmup_iterations, iteration * batch_size, []
            step_size.fill_(args.learning_rate * max(0, 1 - (global_step - batch_size) / args.anneal_steps))
            noise = gumbel(*shape, num_actions).to(device)
            for t in range(args.num_steps):
                # ---- Training: one step of the games -------------------------------------------------
                actions = agent.act(obs.to(device), noise[t]) if learning else noise[t].argmax(-1)
                actions = actions.cpu()
                copies += [envs.games] if copying else []
                env_start = time.perf_counter()
                images, reward, ends, cut, info = envs.step(actions.numpy())
                env_time += time.perf_counter() - env_start
                obs, transition, ended = torch.tensor(images), ~ended, ends | cut
                replay.add(actions, reward, ends, transition, obs, over)
                over = (info["terminated"] != 0) | cut  # games, not lives
                game_points += np.where(transition, info["reward"], 0.0)
                game_lengths += transition
                for index in over.nonzero()[0].tolist():
                    step = (iteration - 1) * batch_size + (t + 1) * args.num_envs
                    seconds, steps = time.perf_counter() - run.started, int(game_lengths[index])
                    episode = step, seconds, index, float(game_points[index]), steps
                    episodes.append(dict(zip(EPISODES, episode)))
                    game_points[index] = game_lengths[index] = 0

                # ---- Lower level: updates and target copies ------------------------------------------
                update_start = time.perf_counter()
                before = replay.transitions - int(transition.sum())
                for count in range(before + 1, replay.transitions + 1) if learning else ():
                    if count % args.train_frequency == 0:
                        logged = update(*(column.to(device) for column in replay.sample(args.batch_size)))
                    if count % args.target_frequency == 0:
                        for each in agents:
                            each.targets.load_state_dict(each.critics.state_dict())
                update_time += time.perf_counter() - update_start

            # ---- Upper level: ask the teacher --------------------------------------------------------
            if iteration == 1 and args.reward_update != "ground-truth" and replay.terminated.any():
                compare = "compare with --reward-update constant and frozen, or use --no-episodic-life"
                say(f"episodes end early here, so their length leaks the true reward: {compare}")
            reward_start, first = time.perf_counter(), replay.added - args.num_steps
            rows = torch.arange(first, replay.added) % replay.size
            valid, true_rewards = replay.valid[rows], replay.rewards[rows]
            windows = fragment_windows(valid.float(), length)

            def cut_pairs(count: int) -> tuple[Tensor, ...]:
                """Frames (P, 2, L + 3, 84, 84), actions, true rewards, steps and games (P, 2, L) of pairs."""
                times, games = draw_pairs(windows, count, length, *numbers)
                where = (first + times) % replay.size, games
                frames = replay.history(first + times[..., 0], games[..., 0], length + 3)
                return frames, replay.actions[where].long(), replay.rewards[where], times, games

            # Measured on pairs that nobody labels, before the network has seen any of this iteration.
            frames, chosen, heldout_rewards, *_ = cut_pairs(args.heldout_pairs if has_network else 0)
            with torch.no_grad():
                guess = rewards_of(model, stacks(frames), chosen).cpu()
            wanted = labels_wanted(args, iteration, num_iterations, warmup_iterations)
            due = max(0, wanted - (len(pairs_asked(people)) if human else asked))
            due = due if uses_labels and (human or not args.labels) else 0
            candidates = args.reward_candidates if learning else 1  # fresh networks disagree by chance
            drawn = cut_pairs(due * candidates)
            if candidates > 1:
                with torch.no_grad():
                    returns = [rewards_of(member, stacks(drawn[0]), drawn[1]).sum(-1) for member in model]
                disagreements = disagreement(returns).cpu()
                drawn = [each[disagreements.topk(min(due, len(disagreements))).indices] for each in drawn]
            frames, chosen, pair_rewards, times, games = drawn
            if human:
                ask_people(people, args, frames=frames, actions=chosen)
                file, waits = people / "labels.jsonl", args.wait_for_labels
                while waits and not run.stop_signal and {*pairs_asked(people)} - read_labels(file).keys():
                    time.sleep(0.2)
                answers, answered = zip(*labelled_pairs(file, taken_up)), slice(0)
                new = [(pair["frames"], pair["actions"], label) for pair, label in answers]
            else:
                labels, answered = teacher_labels(pair_rewards, args.teacher)
                new = [*zip(frames[answered], chosen[answered], labels[answered])]
            queue, asked = [*queue, *new][-args.queue_size :], asked + len(new)
            # At most a minibatch: the gradient of thousands of pairs at once takes tens of GB.
            fresh = min(len(new), args.queue_size, args.reward_batch_size) if learning else 0
            label_accuracy = math.nan
            if given or new:  # not learned from so far
                judged_obs, judged_actions, their_labels = columns_of((given or new)[-64:])
                with torch.no_grad():
                    judgements = rewards_of(model, judged_obs, judged_actions)
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
                adds = adds and fresh > int(args.permute_cross_entropy) and global_step > args.implicit_starts
            rollouts = []
            if adds and (pbrl or copying):
                rollouts = make_rollouts(*(each[answered][-fresh:] for each in (times, games, chosen)))
            simulated += sum(int((weights > 0).sum()) for *_, weights in rollouts)
            epochs = args.reward_epochs if learning else args.warmup_epochs
            epochs *= uses_labels and len(queue) > 0 and iteration >= warmup_iterations
            orders = [torch.randperm(len(queue)) for _ in range(epochs)]
            minibatches = [mb for order in orders for mb in order.split(args.reward_batch_size)]
            minibatches = [[queue[row] for row in each] for each in minibatches]
            newest = queue[-fresh:]
            steps = {"newest": [newest], "newest-every-step": [newest] * len(minibatches)}
            added_pairs = (steps | {"queue": minibatches})[args.implicit_pairs] if adds else []
            shift = int(torch.randint(1, fresh, ())) if adds and args.permute_cross_entropy else 0
            epoch_losses, terms = [], []
            model.train()
            for k, mb in enumerate(minibatches):
                mb_obs, mb_actions, mb_labels = columns_of(mb)
                rewards = [rewards_of(each, mb_obs, mb_actions) for each in model]
                losses = torch.stack([cross_entropies(each, mb_labels) for each in rewards]).mean(0)
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
            logged = {}
            if epoch_losses:
                metrics["losses/cross_entropy"] = float(torch.cat(epoch_losses)[-len(queue) :].mean())
            ratio, factor, score = torch.stack(terms).nanmean(0).tolist() if terms else (math.nan,) * 3
            bilevel = {"labels": asked, "simulator_steps": simulated, "implicit_ratio": ratio}
            bilevel |= {"implicit_weight": weight * factor if terms else 0.0, "score_mean": score}
            bilevel["true_reward"] = true_rewards[valid].mean()
            if has_network:
                oracle, _ = teacher_labels(heldout_rewards, "oracle")
                bilevel["heldout_accuracy"] = accuracy(guess, heldout_rewards)
                bilevel["heldout_cross_entropy"] = cross_entropies(guess, oracle).mean()
                both = torch.stack([guess.flatten(), heldout_rewards.flatten()])
                bilevel["reward_correlation"] = torch.corrcoef(both)[0, 1]
                bilevel |= {"learned_reward": guess.mean(), "label_accuracy": label_accuracy}
            metrics |= {f"bilevel/{name}": None if math.isnan(x) else float(x) for name, x in bilevel.items()}
            metrics |= {"losses/alpha": alpha, "time/env": env_time, "time/reward": now - reward_start}
            metrics["time/policy"] = reward_start - iteration_start - env_time - update_time
            metrics["time/update"] = now - reward_start + update_time
            run.log(global_step, metrics, episodes)
            losses = [value for name, value in metrics.items() if name.startswith("losses/")]
            weights = torch.stack([weight.sum() for each in (*agents, model) for weight in each.parameters()])
            watched = {"rewards": true_rewards, "losses": torch.tensor(losses), "weights": weights}
            for name, values in watched.items():
                if not values.isfinite().all():
                    raise Diverged(f"the {name} stopped being finite by step {global_step:,}")
            if iteration % args.checkpoint_every == 0 or iteration == num_iterations or run.stop_signal:
                state = {"env_id": args.env_id, "agent_sizes": agent_sizes, "taken": sorted(taken_up)}
                state["upper"] = queue, asked, fresh, simulated
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
