"""SAC and STSAC: Stackelberg soft actor-critic (Zheng et al. 2022, arXiv:2109.12286), off-policy. The two
players are the actor and the critics of one agent, not two agents.

`stddpg.py` with a stochastic actor a = tanh(mean + std noise), two critics and an entropy term of the fixed
weight eta:

    f(theta, omega) = mean (eta log pi(a|s) - min_i Q_i(s, a)),  a ~ pi_theta(.|s)
                                                                   eq. (9) -> actor_objective, policy_loss
    L(theta, omega) = sum_i mean (Q_i(s, a) - y)^2                eq. (10) -> critic_objective, CriticJacobian
    y = r + gamma (1 - terminated) (min_i Q'_i(s', a') - eta log pi(a'|s')),  a' ~ pi_theta(.|s')
                                                                           -> backup

One leads, `--leader`: it descends its total derivative, the other its own gradient, both at the old point
(Algorithm 1).

    actor   g = d_theta f - (d_theta d_omega L) x,  (d2_omega L + lambda I) x = d_omega f   eq. (15), Prop. 2
    critic  g = d_omega L - (d_omega d_theta f) x,  (d2_theta f + lambda I) x = d_theta L   eq. (16)

theta reaches L through y alone, so (d_theta d_omega L) x = -2 mean z d_theta y with z = sum_i d_omega
Q_i(s, a).x_i, and **the actor descends f + 2 mean z y**. d2_omega L has a block for each critic, and
d_omega f touches critic i only where it is the least. `--ihvp kernel`, the Gauss-Newton part, needs the rows
alone: z_i = (lambda I + K_i)^-1 J_i b_i with K_i = 2/n J_i J_i^T -> CriticJacobian, kernel_response.
`--ihvp cg` is the paper's solve with the full, indefinite Hessian and a guard -> hessian_product,
cg_response, guarded_solve, conjugate_gradient, critic_correction.

Controls: `--leader none-simultaneous` drops the implicit term and nothing else; `none-sequential` is SAC as
usual, the actor after the critics; `--control constant` puts -1 for each 2 z, without a solve, and `permuted`
that of another row, to see what the solve is worth. docs/stackelberg.md lists what differs from the paper.

    python stsac.py --env-id HalfCheetah-v4
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
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
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
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
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
    """The run, the task, then the algorithm."""

    exp_name: str = Path(__file__).stem
    """name of the experiment"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """seed of the environments, the initial weights, the actions and the minibatches"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto: cuda if there is one"""
    cuda_graphs: bool = True
    """launch an update on a CUDA device as one graph; otherwise kernel by kernel, for debugging"""
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
    eval_every: PositiveInt = 10_000
    """environment steps between two evaluations"""
    eval_episodes: Annotated[int, Field(ge=0, le=10_000)] = 10
    """episodes of an evaluation, without exploration, through Gymnasium; 0: never"""
    capture_video: bool = False
    """film one such episode"""

    env_id: str = "HalfCheetah-v4"
    """any task with a bounded Box action space; also namespace/Name-v0 and module:Name-v0"""
    env_kwargs: Annotated[str, pydantic.AfterValidator(json_object)] = "{}"
    """keyword arguments of the task, as JSON: '{"forward_reward_weight": 2}'"""
    env_backend: Literal["auto", "envpool", "sync", "async"] = "auto"
    """who steps the environments: EnvPool, or Gymnasium in this process or in one for each; auto: EnvPool
    where it has the task, else sync"""
    env_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """EnvPool threads; 0: one for each usable core, at most num_envs"""
    total_timesteps: PositiveInt = 400_000
    """environment steps in all, rounded down to whole iterations; 400,000 in the paper's figures"""
    num_envs: Annotated[int, Field(ge=1, le=65536)] = 1
    """parallel environments"""

    num_steps: PositiveInt = 250
    """steps of each environment in an iteration, which ends with a row of metrics.csv"""
    leader: Literal["actor", "critic", "none-simultaneous", "none-sequential"] = "actor"
    """who follows its total derivative; none-simultaneous: nobody; none-sequential: nobody, the actor steps
    after the critic"""
    ihvp: Literal["kernel", "cg"] = "kernel"
    """solve if the actor leads: kernel, exact with the Gauss-Newton Hessian, or cg, the paper's; a leading
    critic has cg"""
    regularisation: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 10.0
    """lambda, added to the follower's Hessian; inf: none-simultaneous; the paper has 500
    for continuous control, its code 0"""
    regularisation_decay: Annotated[float, Field(gt=0, allow_inf_nan=True)] = math.inf
    """environment steps in which lambda falls by the factor e; 100000 in the paper's code"""
    cg_iterations: PositiveInt = 10
    """iterations of conjugate gradients; 10 in the paper"""
    control: Literal["none", "constant", "permuted"] = "none"
    """weights of the backups if the actor leads, in place of the solve's, whose mean is near -1: -1 for each
    row, without a solve, or that of another row"""
    follower_steps: PositiveInt = 1
    """m, steps of the follower for one of the leader; 1 in the paper; the critic follows if nobody leads"""
    learning_rate: PositiveFloat = 1e-3
    """Adam step size of the actor"""
    critic_learning_rate: PositiveFloat = 1e-3
    """Adam step size of the critic"""
    gamma: Fraction = 0.99
    """discount factor"""
    polyak: Fraction = 0.995
    """what the target keeps of itself in an update"""
    batch_size: PositiveInt = 100
    """transitions in a minibatch"""
    buffer_size: PositiveInt = 1_000_000
    """latest transitions that minibatches are drawn from"""
    random_steps: NonNegativeInt = 10_000
    """environment steps with uniformly random actions"""
    learning_starts: NonNegativeInt = 1_000
    """environment steps before the first update"""
    update_every: PositiveInt = 50
    """steps of each environment between two blocks of updates, of one for each new transition"""
    entropy_coef: NonNegativeFloat = 0.2
    """eta, the fixed weight of the entropy"""
    actor_width: Width = 256
    """units in each of the actor's two hidden layers"""
    critic_width: Width = 256
    """units in each of the critic's two hidden layers"""

    @pydantic.model_validator(mode="after")
    def check_shapes(self):
        """Raise BadInput unless there is a whole iteration of whole blocks and the solve is defined."""
        steps = self.num_envs * self.num_steps
        if self.total_timesteps < steps:
            raise BadInput(f"--total-timesteps {self.total_timesteps} is less than one iteration of {steps}")
        if self.num_steps % self.update_every:
            raise BadInput(f"--update-every {self.update_every} must divide --num-steps {self.num_steps}")
        if self.leader == "actor" and self.ihvp == "kernel" and self.regularisation == 0:
            raise BadInput("--regularisation is 0: --ihvp kernel needs more, its Hessian is singular")
        if self.control != "none" and (self.leader != "actor" or self.regularisation == math.inf):
            needs = "it replaces the weights of --leader actor with a finite --regularisation; leave it out"
            raise BadInput(f"--control is {self.control!r}: {needs}")
        return self

    def agent_sizes(self, obs_dim: int, action_dim: int) -> tuple:
        """What `Agent` is made of."""
        return obs_dim, action_dim, self.actor_width, self.critic_width, self.entropy_coef


METRICS = (
    "global_step", "wall_time_s", "charts/episodic_return", "charts/episodic_length", "charts/SPS",
    "losses/qf_loss", "losses/q_values", "losses/actor_loss", "losses/actor_gradient_norm",
    "bilevel/direct_norm", "bilevel/correction_norm", "bilevel/multiplier", "bilevel/cosine",
    "bilevel/ihvp_residual", "bilevel/negative_curvature", "bilevel/plain_fraction", "bilevel/weight_mean",
    "bilevel/weight_std", "bilevel/regularisation", "bilevel/inner_gradient_norm_before",
    "bilevel/inner_gradient_norm_after", "charts/eval_return", "time/env", "time/policy", "time/update",
    "time/evaluation",
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


# ---- Networks (shared) -------------------------------------------------------------------------------
def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden ReLU layers with PyTorch's initial weights, as in Spinning Up, which the paper builds on."""
    hidden = nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def check_action_space(env_id: str, space: gym.Space) -> None:
    """Raise BadInput unless the actions are vectors of numbers in a box whose size is a number (float32)."""
    box = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"
    if box:
        low, high = torch.tensor(space.low).float(), torch.tensor(space.high).float()
        box = len(low) > 0 and bool((low < high).all() and (high - low).isfinite().all())
    if not box:
        needs = "this script needs a flat Box of floats with low < high, high - low finite in float32"
        raise BadInput(f"--env-id {env_id!r} has the action space {space}; {needs}")


# ---- Policy ------------------------------------------------------------------------------------------
class Agent(nn.Module):
    """A squashed Gaussian actor, two critics Q(s, a) and their targets; their actions lie in [-1, 1].

    The actor may be any module from observations (..., D) to (..., 2A), means and log standard deviations; a
    critic one that `check_critics` takes. Called with raw observations, the agent is the policy as played.
    """

    def __init__(
        self, obs_dim: int, action_dim: int, actor_width: int, critic_width: int, entropy_coef: float
    ):
        super().__init__()
        self.entropy_coef = entropy_coef
        self.noise_dim = action_dim  # random numbers that an action takes in an update
        self.actor = mlp(obs_dim, actor_width, 2 * action_dim)
        self.critics = nn.ModuleList([mlp(obs_dim + action_dim, critic_width, 1) for _ in range(2)])
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.register_buffer("action_low", torch.full((action_dim,), -1.0))  # the task's action box
        self.register_buffer("action_high", torch.full((action_dim,), 1.0))

    def set_action_space(self, space: gym.spaces.Box) -> None:
        """Keep the task's action box."""
        self.action_low.copy_(torch.as_tensor(space.low))
        self.action_high.copy_(torch.as_tensor(space.high))

    def policy(self, outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (n, A) for the actor's outputs (n, 2A), means and log standard deviations, and standard
        normal noise (n, A); and what each costs besides its value (n,), eta log pi(a|s).

        log pi has the term -sum log(1 - tanh(u)^2) of the squashing (Haarnoja et al. 2018, appendix C), in
        the form log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)) that does not underflow.
        """
        mean, logstd = outputs.chunk(2, -1)
        logstd = logstd.clamp(-20, 2)
        u = mean + logstd.exp() * noise
        gaussian = -0.5 * noise * noise - logstd - 0.5 * math.log(2 * math.pi)
        squashing = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        return torch.tanh(u), self.entropy_coef * (gaussian - squashing).sum(-1)

    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Sampled actions (N, A) at obs (N, D) with standard normal noise (N, A)."""
        return self.policy(self.actor(obs), noise)[0]

    def task_actions(self, actions: Tensor) -> Tensor:
        """Actions (..., A) in [-1, 1] as the task takes them: spread over its box."""
        spread = self.action_low + 0.5 * (actions + 1) * (self.action_high - self.action_low)
        return spread.clamp(self.action_low, self.action_high)

    def forward(self, raw_obs: Tensor) -> Tensor:
        """The policy as it is played: raw observations (..., D) -> squashed means in the box (..., A)."""
        outputs = self.actor(torch.as_tensor(raw_obs).float())
        return self.task_actions(torch.tanh(outputs.chunk(2, -1)[0]))


# ---- Derivatives of the critics (shared) -------------------------------------------------------------
def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """One vector (P,) of the numbers of all tensors: theta or omega, if they are a network's parameters."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def unflatten(vector: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`: views of a vector (P,) in the shapes of the parameters."""
    parts = vector.split([each.numel() for each in parameters])
    return [part.view(each.shape) for part, each in zip(parts, parameters)]


def call(network: nn.Module, parameters: Tensor, rows: Tensor) -> Tensor:
    """The outputs (n, O) of the network with its parameters taken from a vector (P,), at rows (n, D)."""
    names, own = zip(*network.named_parameters())
    return torch.func.functional_call(network, dict(zip(names, unflatten(parameters, own))), (rows,))


class CriticJacobian:
    """Q_i (E, n) of E critics at n rows (s, a), and J_i = d_omega Q_i (n, P / E) of each as products with it.

    Q is one number a row, so its gradient in the weights of a linear layer is the outer product of delta,
    the derivative of Q by the layer's outputs, and the layer's inputs h. One torch.func.vjp by zeros that
    are added to the outputs of all layers gives every delta, whatever lies between the layers. A critic may
    be any module whose parameters are those of nn.Linear layers, each used once (`check_critics`).

    With `least` J is d_omega min_i Q_i: the row k of J_i is 0 unless critic i is the least in that row.
    """

    def __init__(self, critics: nn.ModuleList, rows: Tensor, least: bool = False):
        """Forward and backward pass at rows (n, D + A); keeps the values, the factors of J, and slopes
        (n, D + A), the derivative of min_i Q_i (without `least` of sum_i Q_i) by the rows."""
        layers = [module for module in critics.modules() if type(module) is nn.Linear]

        def shifted_values(rows: Tensor, shifts: list[Tensor]) -> tuple[Tensor, dict[nn.Linear, Tensor]]:
            inputs = {}

            def shift(layer, arguments, outputs):
                inputs[layer] = arguments[0]
                return outputs + shifts[layers.index(layer)]

            with contextlib.ExitStack() as hooks:
                for layer in layers:
                    hooks.enter_context(layer.register_forward_hook(shift))
                return torch.stack([critic(rows).squeeze(-1) for critic in critics]), inputs

        with torch.no_grad():
            zeros = [rows.new_zeros(len(rows), layer.out_features) for layer in layers]
            self.values, pull_back, inputs = torch.func.vjp(shifted_values, rows, zeros, has_aux=True)
            chosen = torch.ones_like(self.values)
            if least:
                chosen = torch.zeros_like(self.values).scatter(0, self.values.argmin(0, keepdim=True), 1.0)
            self.slopes, deltas = pull_back(chosen)
        factors, depth = [*zip(deltas, (inputs[layer] for layer in layers))], len(layers) // len(critics)
        self.factors = [factors[first : first + depth] for first in range(0, len(factors), depth)]

    @torch.no_grad()
    def vjp(self, u: Tensor) -> Tensor:
        """J^T u: (E, n) -> (P,)."""
        parts = []
        for own, factors in zip(u, self.factors):
            for delta, h in factors:
                scaled = delta * own[:, None]
                parts += [scaled.T @ h, scaled.sum(0)]
        return flatten(parts)

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        """J v: (P,) -> (E, n)."""
        results = torch.zeros_like(self.values)
        for result, own, factors in zip(results, v.chunk(len(self.factors)), self.factors):
            for delta, h in factors:
                size = delta.shape[1] * h.shape[1]
                weight, bias, own = own.tensor_split([size, size + delta.shape[1]])
                result += (torch.addmm(bias, h, weight.view(-1, h.shape[1]).T) * delta).sum(1)
        return results

    @torch.no_grad()
    def kernel(self, other: "CriticJacobian") -> Tensor:
        """J_i J_i^T (E, n, m) of the same critics at two sets of rows, layer by layer."""
        kernels = []
        for factors, others in zip(self.factors, other.factors):
            layers = zip(factors, others)
            kernels.append(sum((h @ k.T + 1) * (delta @ epsilon.T) for (delta, h), (epsilon, k) in layers))
        return torch.stack(kernels)


def hessian_product(loss: Callable[[Tensor], Tensor], at: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> H v, (P,) -> (P,), for the Hessian H of a scalar loss(at). H is symmetric, so the pull-back of
    the gradient is the product: what it needs is recorded once, a product is one backward pass."""
    pull_back = torch.func.vjp(torch.func.grad(loss), at.detach())[1]
    return torch.no_grad()(lambda v: pull_back(v)[0])  # no graph of the product


def check_critics(critics: nn.ModuleList, width: int) -> None:
    """Raise BadInput if `CriticJacobian` does not hold for these critics of rows (n, width), as with a layer
    that is used twice or critics of different sizes."""
    critics, generator = copy.deepcopy(critics).cpu().double(), torch.Generator().manual_seed(0)
    for parameter in critics.parameters():  # a last layer of zeros would hide all others
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    rows = torch.randn(8, width, generator=generator).double()
    try:
        jacobian, values = CriticJacobian(critics, rows), torch.cat([critic(rows) for critic in critics], 1).T
        expected = flatten(torch.autograd.grad(values.square().sum(), [*critics.parameters()]))
        holds = torch.allclose(jacobian.vjp(2 * values.detach()), expected, rtol=1e-6, atol=1e-9)
        holds &= len({len(flatten(critic.parameters())) for critic in critics}) == 1
    except (RuntimeError, KeyError):  # a layer that torch.func does not take, or that is not used
        holds = False
    if not holds:
        wrong = "the critic's derivatives do not hold: its parameters must be those of nn.Linear layers"
        needs = "each used once, on rows that do not depend on each other, and critics of one size"
        raise BadInput(f"{wrong} with biases, {needs}")


# ---- The two players' objectives (shared) ------------------------------------------------------------
def backup(agent: Agent, rewards: Tensor, discounts: Tensor, next_obs: Tensor, noise: Tensor) -> Tensor:
    """y (n,), differentiable in theta: rewards, discounts = gamma (1 - terminated) (n,), next_obs (n, D),
    noise (n, noise_dim).

    The targets' parameters carry no graph, their action input does. Were y detached, d_theta d_omega L
    would be 0.
    """
    actions, costs = agent.policy(agent.actor(next_obs), noise)
    rows = torch.cat([next_obs, actions], 1)
    values = torch.cat([target(rows) for target in agent.targets], 1).amin(1)
    return rewards + discounts * (values - costs)


def policy_loss(actions: Tensor, costs: Tensor, slopes: Tensor) -> Tensor:
    """A scalar with the gradient d_theta f, f = mean (costs - min_i Q_i(s, a)): actions (n, A), costs (n,),
    slopes = d_a min_i Q_i (n, A). The deterministic policy gradient (Silver et al. 2014)."""
    return (costs - (slopes * actions).sum(1)).mean()


def critic_objective(agent: Agent, omega: Tensor, pairs: Tensor, backups: Tensor) -> Tensor:
    """L as a function of omega (P,): pairs (n, D + A) of observations and actions, backups (n,)."""
    critics = zip(agent.critics, omega.chunk(len(agent.critics)))
    return sum((call(critic, own, pairs).squeeze(-1) - backups).square().mean() for critic, own in critics)


def actor_objective(agent: Agent, theta: Tensor, omega: Tensor, obs: Tensor, noise: Tensor) -> Tensor:
    """f as a function of theta and omega, one vector each, at obs (n, D) with noise (n, noise_dim)."""
    actions, costs = agent.policy(call(agent.actor, theta, obs), noise)
    rows, critics = torch.cat([obs, actions], 1), zip(agent.critics, omega.chunk(len(agent.critics)))
    return (costs - torch.cat([call(critic, own, rows) for critic, own in critics], 1).amin(1)).mean()


def follower_gradient(
    agent: Agent, follower: str, pairs: Tensor, obs: Tensor, noise: Tensor, following: tuple[Tensor, ...]
) -> Tensor:
    """The gradient (P,) of the follower's own objective where both players are now: d_omega L, or d_theta f
    of the actor. pairs (n, D + A); obs (n, D) and noise (n, noise_dim) for the actor's own; following: what
    `backup` takes beside the agent."""
    if follower == "critic":
        data = CriticJacobian(agent.critics, pairs)
        with torch.no_grad():
            return data.vjp(2 / len(pairs) * (data.values - backup(agent, *following)))
    actions, costs = agent.policy(agent.actor(obs), noise)
    led = CriticJacobian(agent.critics, torch.cat([obs, actions.detach()], 1), least=True)
    loss = policy_loss(actions, costs, led.slopes[:, obs.shape[1] :])
    return flatten(torch.autograd.grad(loss, [*agent.actor.parameters()]))


# ---- Stackelberg mathematics (shared) ----------------------------------------------------------------
def kernel_response(data: CriticJacobian, led: CriticJacobian, damping: float | Tensor) -> Tensor:
    """z = d_omega Q_i(s, a).x of each critic (E, n), where (H + damping I) x = b = d_omega f, exactly, for
    the Gauss-Newton H = 2/n J^T J and b = -1/n J_led^T 1. data: the critics at (s, a); led: their least at
    (s, mu(s)).

    J (H + damping I)^-1 = (K + damping I)^-1 J with K = 2/n J J^T (n, n), so x is never formed: the kernels
    J J^T and J J_led^T of n x n numbers, and a Cholesky factor in float64, are all there is. H is positive
    semidefinite, so a damping above its rounding (about 1e-7 of the largest eigenvalue) makes the solve
    safe; z is 0, the individual gradient, where the factorisation fails or z is not finite.
    """
    n = data.values.shape[1]
    right, systems = -data.kernel(led).sum(2, keepdim=True).double() / n, data.kernel(data).double() * (2 / n)
    systems.diagonal(dim1=1, dim2=2).add_(damping)
    factors, failed = torch.linalg.cholesky_ex(systems)
    # Two triangular solves: cholesky_solve of two critics' systems cannot be captured in a CUDA graph.
    half = torch.linalg.solve_triangular(factors, right, upper=False)
    z = torch.linalg.solve_triangular(factors.mT, half, upper=True)[..., 0].to(data.values)
    return torch.where((failed == 0)[:, None] & z.isfinite(), z, 0.0)


def kernel_residual(z: Tensor, data: CriticJacobian, led: CriticJacobian, damping: float | Tensor) -> Tensor:
    """|(H + damping I) x - b| / |b| in the space of the parameters, for the x = (b - 2/n J^T z) / damping
    that belongs to the z (E, n) of `kernel_response`; it is |2/n J^T (J x - z)| / |b|."""
    n = z.shape[1]
    b = led.vjp(torch.full_like(z, -1 / n))
    x = (b - data.vjp(2 / n * z)) / damping
    return data.vjp(2 / n * (data.jvp(x) - z)).norm() / b.norm()


def cg_response(
    data: CriticJacobian, led: CriticJacobian, product: Callable, damping: float | Tensor, iterations: int
) -> tuple[Tensor, bool, Callable[[], Tensor]]:
    """z (E, n) as in `kernel_response`, with the H of `product`, by `guarded_solve`; whether its guard
    stopped it, and its residual."""
    b = led.vjp(torch.full_like(led.values, -1 / led.values.shape[1]))
    x, stopped, residual = guarded_solve(product, b, damping, iterations)
    return data.jvp(x), stopped, residual


def critic_hessian(agent: Agent, pairs: Tensor, backups: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> d2_omega L v, (P,) -> (P,), at pairs (n, D + A) and backups (n,). Indefinite."""
    omega, backups = flatten(agent.critics.parameters()), backups.detach()
    return hessian_product(lambda omega: critic_objective(agent, omega, pairs, backups), omega)


def actor_hessian(agent: Agent, obs: Tensor, noise: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> d2_theta f v, (P,) -> (P,), at obs (n, D). Indefinite as well, and f may have no minimum: here
    lambda is needed. f is what the actor minimises; on the Hessian of -f, as Algorithm 2 has it, lambda would
    make the matrix singular."""
    theta, omega = (flatten(each.parameters()).detach() for each in (agent.actor, agent.critics))
    return hessian_product(lambda theta: actor_objective(agent, theta, omega, obs, noise), theta)


def critic_correction(agent: Agent, obs: Tensor, noise: Tensor, x: Tensor) -> Tensor:
    """(d_omega d_theta f) x (P,) for x in the space of theta: the pull-back of d_theta f, taken as a function
    of omega."""
    theta, omega = (flatten(each.parameters()).detach() for each in (agent.actor, agent.critics))
    gradient = torch.func.grad(lambda theta, omega: actor_objective(agent, theta, omega, obs, noise))
    pull_back = torch.func.vjp(lambda omega: gradient(theta, omega), omega)[1]
    with torch.no_grad():
        return pull_back(x)[0]


def guarded_solve(
    product: Callable[[Tensor], Tensor], b: Tensor, damping: float | Tensor, iterations: int
) -> tuple[Tensor, bool, Callable[[], Tensor]]:
    """x (P,) with (H + damping I) x = b by `conjugate_gradient`, H given by its `product`; whether the guard
    stopped it; and |(H + damping I) x - b| / |b|, computed when it is asked for."""

    def damped(v: Tensor) -> Tensor:
        return product(v) + damping * v

    x, stopped = conjugate_gradient(damped, b, iterations)
    return x, stopped, lambda: (damped(x) - b).norm() / b.norm()


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-6
) -> tuple[Tensor, bool]:
    """x with A x = b, approximately, for a symmetric A given by `product`, and whether the guard stopped it.

    b, x (P,). Hestenes and Stiefel 1952, from x = 0. The method needs a positive definite A, and the Hessian
    of a network is not: at a direction p of curvature p.Ap <= 0, to rounding relative to the largest one met,
    or that is not finite, it keeps the x that it has (0 in the first iteration, which makes the leader's step
    the individual gradient). Without the guard such a step may turn the actor's direction round. Also stops
    once |b - A x| <= tolerance |b|, thus at b = 0.
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
    """The leader's own gradient (P,) and its total one in numbers; the multiplier is not finite where the own
    one is 0."""
    return {
        "bilevel/direct_norm": own.norm().item(),
        "bilevel/correction_norm": (total - own).norm().item(),
        "bilevel/multiplier": (total.norm() / own.norm()).item(),
        "bilevel/cosine": torch.cosine_similarity(total, own, 0).item(),
    }


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


# ---- Replay (shared) ---------------------------------------------------------------------------------
class Replay:
    """All transitions of a run in a memory-mapped file, of which the last `window` serve. A row: observation,
    action, reward, next observation, terminated, in float32.

    The file is only appended to, so the rows that a checkpoint counts are never written again: a kill at any
    moment leaves them whole, and a resumed run overwrites what came after. Its space is taken at once: a full
    disk shows before the training, not as a crash in its midst.
    """

    def __init__(self, path: Path, capacity: int, obs_dim: int, action_dim: int, window: int, size: int = 0):
        """For `capacity` rows, the first `size` of which are there. Raises OSError."""
        self.widths, self.window, self.size = [obs_dim + action_dim, 1, obs_dim, 1], window, size
        shape = capacity, sum(self.widths)
        with open(path, "ab") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
            else:
                file.truncate(4 * math.prod(shape))
        self.file = np.memmap(path, dtype=np.float32, mode="r+", shape=shape)
        self.rows = np.asarray(self.file)

    def add(self, *columns: np.ndarray) -> None:
        """Append n rows: obs (n, D), actions (n, A), rewards (n,), next_obs (n, D), terminated (n,)."""
        rows = np.column_stack(columns)
        self.rows[self.size : self.size + len(rows)] = rows
        self.size += len(rows)

    def sample(self, count: int, batch_size: int) -> tuple[Tensor, ...]:
        """`count` minibatches (count, batch_size, ...), drawn with replacement: observations with actions
        (..., D + A), rewards (...), next observations (..., D), terminated (...)."""
        index = torch.randint(max(0, self.size - self.window), self.size, (count * batch_size,)).numpy()
        rows = torch.from_numpy(self.rows.take(index, 0)).view(count, batch_size, sum(self.widths))
        pairs, rewards, next_obs, terminated = rows.split(self.widths, -1)
        return pairs, rewards.squeeze(-1), next_obs, terminated.squeeze(-1)


def check_replay(args: Args, capacity: int, size: int, obs_dim: int, action_dim: int) -> None:
    """Raise BadInput if the disk cannot hold the file of a `Replay`, or if the file of a run to resume lacks
    some of the first `size` rows."""
    row, path = 4 * (2 * obs_dim + action_dim + 2), args.resume and args.resume / "replay.bin"
    there = path.stat().st_size if path and path.exists() else 0
    if there < size * row:
        raise BadInput(f"--resume {args.resume}: its replay.bin is missing or damaged; start a new run")
    folder = (args.resume or args.run_dir).absolute()
    place = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    needed, free = capacity * row - there, shutil.disk_usage(place).free
    if needed > free:
        numbers = f"{needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free in {place}"
        needs = f"a replay of {capacity:,} rows, observations of {obs_dim:,} numbers, takes {numbers}"
        raise BadInput(f"--total-timesteps {args.total_timesteps}: {needs}; name less or another --run-dir")


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


# ---- Off-policy training: set-up (shared) ------------------------------------------------------------
def train(args: Args) -> Path:
    """Train, play and return the run folder. Raises BadInput before anything is created, and Diverged."""
    with Run(args) as run:
        checkpoint, start, iteration_steps = run.checkpoint, run.global_step, args.num_envs * args.num_steps
        if start % iteration_steps or start > args.total_timesteps:
            needs = "--total-timesteps must be at least that, and --num-envs x --num-steps must divide it"
            raise BadInput(f"--resume {args.resume} has made {start} steps: {needs}")
        torch.manual_seed(args.seed)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
        device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        torch.set_num_threads(1)  # networks this small lose more to a hand-over than they gain
        envs, observation_space, action_space = make_envs(args, derived_seed(args.seed, start))
        if args.eval_episodes or args.capture_video:
            play(None, args, episodes=0)
        obs_dim, action_dim = observation_space.shape[0], action_space.shape[0]
        stored = checkpoint.get("replay_size", 0) if checkpoint else 0
        if start < run.end:
            check_replay(args, run.end, stored, obs_dim, action_dim)

        # ---- Off-policy training: networks and optimisers (shared) -----------------------------------
        agent_sizes = args.agent_sizes(obs_dim, action_dim)
        agent = Agent(*agent_sizes)
        agent.to(device).eval()  # acting and learning are one function of the weights: no dropout in either
        check_critics(agent.critics, obs_dim + action_dim)
        thetas, omegas = [*agent.actor.parameters()], [*agent.critics.parameters()]
        players = (thetas, args.learning_rate), (omegas, args.critic_learning_rate)
        # So that a CUDA graph can hold a step: fused and capturable.
        optimisers = [torch.optim.Adam(*each, fused=True, capturable=True) for each in players]
        actor_optimiser, critic_optimiser = optimisers
        if checkpoint:
            try:
                agent.load_state_dict(checkpoint["agent"])
                for each, state in zip(optimisers, checkpoint["optimisers"]):
                    # Not the step size, which may have been given again.
                    each.load_state_dict(each.state_dict() | {"state": state["state"]})
                torch.set_rng_state(checkpoint["rng"])  # every random number is drawn on the CPU
                stored = checkpoint["replay_size"]
            except (RuntimeError, ValueError, KeyError) as error:
                wrong = "another version made it, or networks of another shape; leave out widths and task"
                raise BadInput(f"--resume {args.resume}: {wrong}") from error
        agent.set_action_space(action_space)
        follower = "actor" if args.leader == "critic" else "critic"
        # Whether there is an implicit term.
        leads = args.leader in ("actor", "critic") and args.regularisation < math.inf
        damping = torch.zeros((), dtype=torch.float64, device=device)  # lambda
        # Updates whose solve the guard stopped, and updates without a correction.
        stops, plain = torch.zeros(2, dtype=torch.int64, device=device)

        def step(optimiser: torch.optim.Adam, gradient: Tensor) -> None:
            """One step of Adam along a gradient (P,)."""
            parameters = optimiser.param_groups[0]["params"]
            for parameter, part in zip(parameters, unflatten(gradient, parameters)):
                parameter.grad = part
            optimiser.step()

        # ---- Off-policy training: one update (shared) ------------------------------------------------
        def update(pairs, rewards, next_obs, terminated, here, there, metrics: dict | None = None) -> None:
            """Step both players, and the targets, by a minibatch: pairs (n, D + A), rewards, terminated (n,),
            next_obs (n, D), the policy's noise in s and in s'; with `metrics`, to put diagnostics into."""
            obs, following = pairs[:, :obs_dim], (rewards, args.gamma * (1 - terminated), next_obs, there)

            # ---- Both players: their own gradients (shared) ------------------------------------------
            with torch.set_grad_enabled(leads):
                backups = backup(agent, *following)
            data = CriticJacobian(agent.critics, pairs)
            errors = data.values - backups.detach()
            omega_gradient = data.vjp(2 / len(pairs) * errors)
            own = {"critic": omega_gradient}
            if args.leader == "none-sequential":
                step(critic_optimiser, omega_gradient)
            actions, costs = agent.policy(agent.actor(obs), here)
            led = CriticJacobian(agent.critics, torch.cat([obs, actions.detach()], 1), least=True)
            actor_loss = policy_loss(actions, costs, led.slopes[:, obs_dim:])

            # ---- Leader: the implicit term (shared) --------------------------------------------------
            if metrics is not None:
                own["actor"] = flatten(torch.autograd.grad(actor_loss, thetas, retain_graph=True))
            if leads and args.leader == "actor":
                if args.control == "constant":
                    response, stopped, residual = torch.full_like(errors, -0.5 / len(errors)), False, None
                elif args.ihvp == "kernel":
                    response, stopped = kernel_response(data, led, damping), False
                    residual = functools.partial(kernel_residual, response, data, led, damping)
                else:
                    system = data, led, critic_hessian(agent, pairs, backups)
                    response, stopped, residual = cg_response(*system, damping, args.cg_iterations)
                weights = 2 * response.sum(0)  # of the backups
                if args.control == "permuted":  # at random, as the rows are drawn independently
                    weights = weights.roll(1)
                actor_loss = actor_loss + (weights * backups).mean()
            elif leads:
                b = torch.autograd.grad(-2 * (errors.sum(0) * backups).mean(), thetas)  # d_theta L
                system = actor_hessian(agent, obs, here), flatten(b)
                response, stopped, residual = guarded_solve(*system, damping, args.cg_iterations)
                omega_gradient = omega_gradient - critic_correction(agent, obs, here, response)
            theta_gradient = flatten(torch.autograd.grad(actor_loss, thetas))
            if leads:
                stops.add_(stopped)
                plain.add_(~response.any())
            if metrics is not None:
                metrics["losses/qf_loss"] = errors.square().mean(1).sum().item()
                metrics["losses/q_values"] = data.values[0].mean().item()
                metrics["losses/actor_loss"] = (costs - led.values.amin(0)).mean().item()
                metrics["losses/actor_gradient_norm"] = own["actor"].norm().item()
                metrics["bilevel/inner_gradient_norm_before"] = own[follower].norm().item()
            if metrics is not None and leads:
                total = theta_gradient if args.leader == "actor" else omega_gradient
                metrics |= leader_diagnostics(own[args.leader], total)
                metrics["bilevel/ihvp_residual"] = residual and residual().item()
                if args.leader == "actor":
                    metrics["bilevel/weight_mean"] = weights.mean().item()
                    metrics["bilevel/weight_std"] = weights.std(correction=0).item()

            # ---- Steps: both players, then the follower alone, then the targets (shared) -------------
            step(actor_optimiser, theta_gradient)
            if args.leader != "none-sequential":
                step(critic_optimiser, omega_gradient)
            for _ in range(args.follower_steps - 1):
                gradient = follower_gradient(agent, follower, pairs, obs, here, following)
                step(actor_optimiser if follower == "actor" else critic_optimiser, gradient)
            if metrics is not None:
                gradient = follower_gradient(agent, follower, pairs, obs, here, following)
                metrics["bilevel/inner_gradient_norm_after"] = gradient.norm().item()
            with torch.no_grad():
                torch._foreach_lerp_([*agent.targets.parameters()], omegas, 1 - args.polyak)

        # A CUDA graph cannot hold the guard of conjugate gradients, which needs numbers on the CPU.
        uses_cg = leads and (args.leader == "critic" or args.ihvp == "cg")
        graphed = args.cuda_graphs and device.type == "cuda" and not uses_cg
        undiagnosed_update = GraphedUpdate(update) if graphed else update

        # ---- Off-policy training: the loop (shared) --------------------------------------------------
        run.open()
        if start < run.end:
            try:
                sizes = run.end, obs_dim, action_dim, args.buffer_size, stored
                replay = Replay(run.folder / "replay.bin", *sizes)
            except OSError as error:  # as where a quota ends
                raise BadInput(f"--run-dir {args.run_dir} cannot hold the replay: {error}") from error
        obs = envs.reset()[0]
        ended = np.zeros(args.num_envs, dtype=bool)  # in the last step; the row after it is a reset
        episode_returns, episode_lengths = np.zeros((2, args.num_envs))
        for iteration in range(start // iteration_steps + 1, run.end // iteration_steps + 1):
            env_time, policy_time, update_time, episodes = 0.0, 0.0, 0.0, []
            metrics, updates, rows_before = dict.fromkeys(METRICS), 0, replay.size
            stops.zero_()
            plain.zero_()
            noise = torch.randn(args.num_steps, args.num_envs, action_dim)
            uniform = 2 * torch.rand(noise.shape) - 1
            for first in range(0, args.num_steps, args.update_every):
                # ---- Off-policy training: collect a block of transitions (shared) --------------------
                block_start, block_env_time, block_rows = time.perf_counter(), env_time, replay.size
                # A CPU is faster than a GPU for a few rows.
                behaviour = agent if device.type == "cpu" else copy.deepcopy(agent).cpu()
                for t in range(first, first + args.update_every):
                    global_step = (iteration - 1) * iteration_steps + (t + 1) * args.num_envs  # with this one
                    with torch.no_grad():
                        actions = uniform[t]
                        if global_step > args.random_steps:
                            actions = behaviour.explore(torch.as_tensor(obs).float(), noise[t])
                        task_actions = behaviour.task_actions(actions).numpy()
                    env_start = time.perf_counter()
                    next_obs, reward, ends, cut, _ = envs.step(task_actions)
                    env_time += time.perf_counter() - env_start
                    transition, ended = ~ended, ends | cut
                    # A reset row is no transition. A time limit is no end: s' is the final observation.
                    columns = obs, actions.numpy(), reward, next_obs, ends
                    replay.add(*(column[transition] for column in columns))
                    episode_returns += np.where(transition, reward, 0.0)
                    episode_lengths += transition
                    obs = next_obs
                    for index in ended.nonzero()[0].tolist():
                        seconds, length = time.perf_counter() - run.started, int(episode_lengths[index])
                        episode = global_step, seconds, index, float(episode_returns[index]), length
                        episodes.append(dict(zip(EPISODES, episode)))
                        episode_returns[index] = episode_lengths[index] = 0
                update_start = time.perf_counter()
                policy_time += update_start - block_start - (env_time - block_env_time)
                if global_step <= args.learning_starts:
                    continue

                # ---- Off-policy training: a block of updates (shared) --------------------------------
                count = replay.size - block_rows  # one update for each transition; a row of resets is none
                arrays = [array.to(device) for array in replay.sample(count, args.batch_size)]
                # The policy's noise in s and in s'.
                arrays += torch.randn(2, count, args.batch_size, agent.noise_dim).to(device)
                damping.fill_(args.regularisation * math.exp(-global_step / args.regularisation_decay))
                for index, minibatch in enumerate(zip(*arrays)):
                    # The iteration's last update; one block earlier if the last may be a row of resets.
                    if index == count - 1 and first >= args.num_steps - max(2, args.update_every):
                        update(*minibatch, metrics)
                    else:
                        undiagnosed_update(*minibatch)
                updates += count
                if device.type == "cuda":
                    torch.cuda.synchronize()  # so that update_time holds the device's work
                update_time += time.perf_counter() - update_start

            # ---- Off-policy training: evaluate, log and checkpoint (shared) --------------------------
            global_step, eval_start = iteration * iteration_steps, time.perf_counter()
            due = global_step // args.eval_every > (global_step - iteration_steps) // args.eval_every
            finite = nn.utils.parameters_to_vector(agent.parameters()).isfinite().all()
            if args.eval_episodes and due and finite:
                returns = play(copy.deepcopy(agent).cpu(), args, args.eval_episodes)
                metrics["charts/eval_return"] = float(np.mean(returns))
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
            for name, value in metrics.items():  # a ratio whose denominator is 0 does not exist
                if name.startswith("bilevel/") and value is not None and not math.isfinite(value):
                    metrics[name] = None
            run.log(global_step, metrics, episodes)
            new_rows = torch.from_numpy(replay.rows[rows_before : replay.size])
            pairs, rewards, next_obs, _ = new_rows.split(replay.widths, 1)
            # After the first action that is not finite the task's answers mean nothing: the actor's fault.
            answers = pairs[:, obs_dim:].isfinite().all(1).cumprod(0).bool()
            losses = [metrics[name] or 0.0 for name in METRICS if name.startswith("losses/")]
            seen = torch.cat([pairs[:, :obs_dim], next_obs], 1)
            watched = {"observations": seen[answers], "rewards": rewards[answers]}
            watched |= {"losses": torch.tensor(losses), "weights": flatten(agent.parameters())}
            for name, numbers in watched.items():
                if not numbers.isfinite().all():
                    raise Diverged(f"the {name} stopped being finite by step {global_step:,}")
            if iteration % args.checkpoint_every == 0 or global_step == run.end or run.stop_signal:
                replay.file.flush()
                state = {"agent_sizes": agent_sizes, "agent": agent.state_dict(), "replay_size": replay.size}
                run.save_checkpoint(state | {"optimisers": [each.state_dict() for each in optimisers]})
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
