"""BLPO for continuous control: bilevel policy optimisation with Nystrom hypergradients (Prakash et al. 2025,
arXiv:2505.11714v1). Two players, the actor theta (leader) and the critic omega (follower) of one agent:

    maximise J(theta, omega*(theta))  subject to  omega*(theta) = argmin_omega L_theta(omega)

(eq. (4) of the authors' poster), where ratio_t = pi_theta(a_t|s_t) / pi_old(a_t|s_t) and

    J = mean_t min(ratio_t A_t, clip(ratio_t, 1-eps, 1+eps) A_t),
        A_t = G_t(omega) - stopgrad V_omega(s_t),  G the lambda-return: omega enters J through the values that
        G bootstraps from;
    L = mean_t (G'_t - V_omega(s_t))^2,  G' the lambda-returns of the rollout, which bootstrap from the critic
        as it was then, at the states it visited. theta enters L through the policy that earns all of G'_t;
        with its advantages A'_t (GAE), and kappa = gamma lambda,
        grad_theta E[G'_t] = E[sum_{k >= t} kappa^(k-t) A'_k grad log pi(a_k|s_k)].

Means are over the transitions of the rollout. The poster's Algorithm 1, in each epoch on a rollout (steps are
Adam's; K is --nested-updates, alpha --damping, and H is approximated from --nystrom-rank directions):

    K passes  omega <- omega - eta_omega grad_omega L            the follower, in minibatches -> follower_step
    b = grad_omega J = J_V^T u,   u = (dG/dV)^T dJ/dG            -> lambda_returns_vjp, CriticJacobian.vjp
    v = (H + alpha I)^-1 b,       H ~ grad^2_omega L, damped     -> nystrom_ihvp | cg_ihvp
    z = J_V v,   e = W^T z,   W_tk = kappa^(k-t) for k >= t in the same episode
                                                                 -> CriticJacobian.jvp, trace
    one pass of PPO's minibatches, v and so e held fixed
              theta <- theta + eta_theta (grad_theta J - (grad_theta,omega L) v),
              (grad_theta,omega L) v = -2 mean_t z_t sum_{k >= t} kappa^(k-t) A'_k grad log pi_k
                                     = -2 mean_k e_k A'_k grad log pi_k

2 z_t / n is how much J gains, through the critic's answer, when the target of row t of n rises, and e_k
collects the rows whose targets action k has a part in. So the hypergradient is a policy gradient with the row
weights 1 + 2 e, its direct part with the advantages A of the critic after its K passes, the other with those
of the targets, A'. Unless --no-norm-adv both are centred and over A's standard deviation in each minibatch,
but b takes A centred alone: so there is one factor 1/std in the correction. --mixed-discount sets kappa: 0
makes each state its own start (the released code's reading), gamma is right for Monte Carlo targets (Zheng et
al. 2022, Prop. 1). `--ihvp none` (e = 0) is the nested control. docs/blpo.md derives this, and
`blpo_continuous_ablations.py` has the released code's variant, which nests in each minibatch.

    python blpo_continuous.py --env-id Hopper-v4 --nystrom-rank 10
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
    """The run, the task, then BLPO."""

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
    """Adam step size of the actor (leader)"""
    critic_learning_rate: PositiveFloat = 2.8e-3
    """Adam step size of the critic (follower)"""
    anneal_lr: bool = True
    """lower both step sizes linearly to 0"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of the advantages and of the critic's targets"""
    bootstrap_truncation: bool = True
    """a time limit bootstraps from the final observation; otherwise it counts as a termination"""
    num_minibatches: PositiveInt = 16
    """minibatches in an epoch, of the actor and of each pass of the critic"""
    update_epochs: PositiveInt = 4
    """passes of the actor over a rollout"""
    nested_updates: PositiveInt = 3
    """K, passes of the critic for each of the actor"""
    ihvp: Literal["nystrom", "cg", "none"] = "nystrom"
    """solver of the damped system; none: the nested control, without the hypergradient"""
    damping: PositiveFloat = 1.0
    """alpha, added to the curvature of the critic's loss"""
    nystrom_rank: Width = 10
    """q, directions in the Nystrom approximation; more than the last layer's inputs and 1 add nothing"""
    cg_iterations: PositiveInt = 10
    """conjugate gradient steps"""
    mixed_discount: Fraction | None = None
    """kappa, how far an action answers for the targets of earlier states; default: gamma * gae_lambda"""
    norm_adv: bool = True
    """normalise the advantages in each minibatch"""
    clip_coef: PositiveFloat = 0.2
    """eps of the clipped ratio"""
    ent_coef: NonNegativeFloat = 0.0
    """weight of the entropy bonus"""
    actor_width: Width = 64
    """units in each of the actor's two hidden layers"""
    critic_width: Annotated[int, Field(ge=0, le=8192)] = 64
    """units in each of the critic's two hidden layers; 0: a linear critic"""

    @pydantic.model_validator(mode="after")
    def check_shapes(self):
        """Raise BadInput unless there is a whole rollout, which the minibatches divide and memory holds."""
        rows = self.num_envs * self.num_steps
        if rows > 10_000_000:
            raise BadInput(f"--num-envs x --num-steps is {rows}, a rollout may have 10,000,000 rows")
        if self.total_timesteps < rows:
            raise BadInput(f"--total-timesteps {self.total_timesteps} is less than one rollout of {rows}")
        if rows % self.num_minibatches:
            raise BadInput(f"--num-minibatches {self.num_minibatches} must divide a rollout of {rows}")
        vectors = 1 if self.ihvp in ("cg", "none") else self.nystrom_rank + 1  # that are in one product
        width = max(self.critic_width, 1)
        numbers = max(rows, width) * width * vectors  # in its largest array
        if numbers > 2_000_000_000:
            product = "the larger of --num-envs x --num-steps and --critic-width, x --critic-width"
            product += " x (--nystrom-rank + 1)" if vectors > 1 else ""
            raise BadInput(f"{product} is {numbers}, it may be 2,000,000,000")
        return self


DIAGNOSTICS = (
    "direct_norm", "correction_norm", "norm_ratio", "cosine", "weight_mean", "weight_std", "ihvp_residual",
    "ihvp_cosine", "inner_gradient_norm_before", "inner_gradient_norm_after", "fallbacks",
)  # fmt: skip
METRICS = (
    "global_step", "wall_time_s", "charts/episodic_return", "charts/episodic_length", "charts/SPS",
    "losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/old_approx_kl", "losses/approx_kl",
    "losses/clipfrac", *(f"bilevel/{name}" for name in DIAGNOSTICS), "time/nested_critic", "time/response",
    "losses/explained_variance", "charts/learning_rate", "time/env", "time/policy", "time/update",
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


# ---- Bilevel mathematics (shared) --------------------------------------------------------------------
def trace(x: Tensor, decay: Tensor) -> Tensor:
    """W^T x, the transpose of what `gae` does to delta (A = W delta): e_t = x_t + decay_{t-1} e_{t-1}.

    x (T, N), 0 where a row is no transition; decay (T, N) = kappa (1 - ended); in `gae` kappa = gamma lambda.
    """
    e = x.clone()
    for t in range(1, len(x)):
        e[t].addcmul_(decay[t - 1], e[t - 1])
    return e


def lambda_returns_vjp(slopes: Tensor, discounts: Tensor, decay: Tensor) -> Tensor:
    """(dG/dV)^T slopes for the lambda-returns G = V + W delta of `gae`: for slopes = dJ/dG (T, N), 0 where a
    row is no transition, u = dJ/dV (T+1, N); discounts and decay (T, N) as in `gae`."""
    back = trace(slopes, decay)  # by delta
    last = torch.zeros_like(slopes[:1])
    return torch.cat([slopes - back, last]) + torch.cat([last, discounts * back])


class CriticJacobian:
    """J_V = dV / d omega (n, P) of any critic at n observations, as products with it.

    V is one number a row, so its gradient in the weights of a linear layer is the outer product of delta,
    the derivative of V by the layer's outputs, and the layer's inputs h. One torch.func.vjp by zeros that
    are added to the outputs of all layers gives every delta, whatever lies between the layers. Other
    parameters, such as those of a layer norm, have their Jacobian in full. Vectors in parameter space are
    flat, in the order of `critic.parameters()`; q of them are (q, P). `last_inputs` (n, F) are the inputs of
    the linear layer that is called last.
    """

    def __init__(self, critic: nn.Module, obs: Tensor):
        """Forward and backward pass at obs (n, D); keeps the values (n,) and the factors of J_V."""
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
        blocks = {}  # of each parameter: (delta, h) for weights, (J_V,) for all else
        for layer, delta in zip(layers, deltas):
            if layer in inputs:
                blocks |= {layer.weight: (delta, inputs[layer]), layer.bias: (delta,)}
        rest = {name: p.detach() for name, p in critic.named_parameters() if p not in blocks}
        if rest:

            def value(rest: dict[str, Tensor], row: Tensor) -> Tensor:
                return torch.func.functional_call(critic, rest, (row[None],)).squeeze()

            with torch.no_grad():
                dense = torch.func.vmap(torch.func.grad(value), (None, 0))(rest, obs)
            blocks |= {p: (dense[name].flatten(1),) for name, p in critic.named_parameters() if name in rest}
        self.blocks = [blocks[p] for p in critic.parameters()]
        self.sizes = [p.numel() for p in critic.parameters()]
        self.last_inputs = [*inputs.values()][-1] if inputs else obs

    def vjp(self, u: Tensor) -> Tensor:
        """J_V^T u for q vectors at once: (q, n) -> (q, P)."""
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
        """J_V v for a vector: (P,) -> (n,)."""
        result = torch.zeros_like(self.values)
        for (delta, *inputs), part in zip(self.blocks, v.split(self.sizes)):
            result += (inputs[0] @ part.view(delta.shape[1], -1).T * delta).sum(1) if inputs else delta @ part
        return result


class GaussNewton:
    """H = 2 sum_t w_t grad V_t grad V_t^T = R^T R, the Gauss-Newton matrix of L = sum_t w_t (G_t - V_t)^2.

    R = diag(sqrt(2 w)) J_V with weights w (n,), 0 for rows that are not in L. It is the Hessian of L without
    the term in the residuals G - V: positive semidefinite, and equal to it for a critic linear in omega.
    """

    def __init__(self, jacobian: CriticJacobian, weights: Tensor):
        self.jacobian, self.root = jacobian, torch.sqrt(2 * weights)

    def product(self, v: Tensor) -> Tensor:
        """H v: (P,) -> (P,)."""
        return self.jacobian.vjp((self.jacobian.jvp(v) * self.root**2)[None])[0]

    def sketch(self, u: Tensor, directions: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """b = J_V^T u (P,), (H S)^T (q, P) and S^T H S (q, q) for directions S (F, q) in the last layer,
        whose inputs, each row times sqrt(2 w), are the features (n, F). R S = features S costs next to
        nothing, so one product with J_V^T for q + 1 vectors gives b and all of H S."""
        images = (features @ directions).T
        products = self.jacobian.vjp(torch.cat([u[None], images * self.root]))
        return products[0], products[1:], images @ images.T


def nystrom_solve(columns: Tensor, core: Tensor, damping: float, b: Tensor) -> Tensor:
    """v = (H_q + damping I)^-1 b with the Nystrom approximation H_q = C M^+ C^T (Prakash et al.'s poster).

    columns C^T = (H S)^T (q, P) and core M = S^T H S (q, q) for directions S; S = some columns of the
    identity gives the poster's C = H[:, Q] and M = H[Q, Q]. The poster's Woodbury formula
        v = b / alpha - C (M + C^T C / alpha)^-1 C^T b / alpha^2
    breaks down where M is singular or slightly indefinite, so M is symmetrised and its eigenvalues below
    1e-8 (in float32: 1e-6) of the largest are dropped: M = E D E^T, H_q = F F^T with F = C E D^-1/2, and
        v = (b - F (alpha I + F^T F)^-1 F^T b) / alpha,   0 < v.b <= |b|^2 / alpha.
    The small system is solved in float64. v is nan where anything in the system is not finite.
    """
    floor = max(1e-8, 10 * torch.finfo(core.dtype).eps)
    try:
        eigenvalues, vectors = torch.linalg.eigh((core + core.T).double() / 2)
    except torch.linalg.LinAlgError:  # M is not finite
        return b * math.nan
    smallest = floor * eigenvalues[-1].clamp(min=torch.finfo(torch.float64).tiny)
    basis = vectors * torch.where(eigenvalues <= smallest, math.inf, eigenvalues).rsqrt()  # E D^-1/2
    columns, right = columns.double(), b.double()
    inner = basis.T @ (columns @ columns.T) @ basis  # F^T F
    inner.diagonal().add_(damping)
    small = torch.cholesky_solve(basis.T @ (columns @ right)[:, None], torch.linalg.cholesky_ex(inner)[0])
    return ((right - columns.T @ (basis @ small)[:, 0]) / damping).to(b.dtype)


def nystrom_ihvp(
    curvature: GaussNewton, u: Tensor, damping: float, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """b = J_V^T u and v = (H_q + damping I)^-1 b: u (n,) -> b, v (P,), of a critic whose last layer is
    linear.

    The directions S lie in that layer, along its leading features Phi (n, width + 1), its inputs and 1
    scaled as R: S = orth((Phi^T Phi)^2 Omega), Omega Gaussian: subspace iteration (Halko et al. 2011).
    """
    last = curvature.jacobian.last_inputs
    features = torch.cat([last, torch.ones_like(last[:, :1])], 1) * curvature.root[:, None]
    omega = torch.randn(rank, features.shape[1], generator=generator).to(features)
    for _ in range(2):
        omega = (omega @ features.T) @ features
    b, columns, core = curvature.sketch(u, torch.linalg.qr(omega.T)[0], features)
    return b, nystrom_solve(columns, core, damping, b)


def conjugate_gradient(product, b: Tensor, iterations: int) -> Tensor:
    """Solve A x = b, b and x (P,), for a symmetric A given as product(v) = A v (Hestenes and Stiefel 1952).

    Guarded: it stops improving x for good where p.A p <= 0 (A is not positive definite there) or where the
    residual has fallen to 1e-6 of b, below which float32 directions are noise. No number is copied to the
    CPU, so that a GPU need not wait.
    """
    x, residual, p = torch.zeros_like(b), b, b
    rr = b @ b
    stop = 1e-12 * rr
    active = torch.ones_like(rr, dtype=torch.bool)
    for _ in range(iterations):
        image = product(p)  # A p
        bend = p @ image
        active = active & (bend > 0) & (rr > stop)
        step = torch.where(active, rr / bend, 0.0)
        x = x + step * p
        residual = residual - step * image
        new_rr = residual @ residual
        p = residual + torch.where(active, new_rr / rr, 0.0) * p
        rr = new_rr
    return x


def cg_ihvp(curvature: GaussNewton, u: Tensor, damping: float, iterations: int) -> tuple[Tensor, Tensor]:
    """b = J_V^T u and v = (H + damping I)^-1 b by conjugate gradients: u (n,) -> b, v (P,)."""
    b = curvature.jacobian.vjp(u[None])[0]
    return b, conjugate_gradient(lambda v: curvature.product(v) + damping * v, b, iterations)


def surrogate_slope(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """The derivative of `clipped_surrogate` by the advantages, of any shape: the ratio of the smaller branch;
    of equal ones the unclipped."""
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return torch.where(ratio * advantages <= clipped * advantages, ratio, clipped)


def follower_step(critic: nn.Module, optimiser, obs: Tensor, targets: Tensor) -> Tensor:
    """One step of the follower on L = mean_t (G_t - V(s_t))^2; obs (n, D), targets (n,). Returns L before."""
    loss = ((targets - critic(obs).squeeze(-1)) ** 2).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.detach()


def inner_gradient_norm(critic: nn.Module, obs: Tensor, targets: Tensor) -> Tensor:
    """|grad_omega L| of L = mean_t (G_t - V(s_t))^2, 0 where the critic has answered in full; obs (n, D),
    targets (n,)."""
    loss = ((targets - critic(obs).squeeze(-1)) ** 2).mean()
    gradient = torch.autograd.grad(loss, [*critic.parameters()])
    return nn.utils.get_total_norm(gradient)


def leader_diagnostics(
    theta: list[nn.Parameter], direct: Tensor, correction: Tensor, e: Tensor
) -> dict[str, Tensor]:
    """The gradients in theta of J and of the correction, and the row weights 1 + 2 e (n,), in numbers."""

    def gradient(objective: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, theta, retain_graph=True)])

    direct, correction = gradient(direct), gradient(correction)
    return {
        "direct_norm": direct.norm(),
        "correction_norm": correction.norm(),
        "norm_ratio": correction.norm() / direct.norm(),
        "cosine": torch.cosine_similarity(direct, correction, dim=0),
        "weight_mean": (1 + 2 * e).mean(),
        "weight_std": (1 + 2 * e).std(correction=0),
    }


def check_critic(critic: nn.Module, obs_dim: int, needs_linear_output: bool) -> None:
    """Raise BadInput if `CriticJacobian` does not hold for this critic, as with a layer that is used twice,
    or, where the solver needs it, if its last layer is not nn.Linear(..., 1) with a bias."""
    critic, generator = copy.deepcopy(critic).cpu().double(), torch.Generator().manual_seed(0)
    for parameter in critic.parameters():  # a last layer of zeros would hide all others
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    obs = torch.randn(8, obs_dim, generator=generator).double()
    try:
        jacobian, values = CriticJacobian(critic, obs), critic(obs).squeeze(-1)
        gradient = torch.autograd.grad(values.square().sum(), [*critic.parameters()])
        expected = torch.cat([g.flatten() for g in gradient])
        holds = torch.allclose(jacobian.vjp(2 * values.detach()[None])[0], expected, rtol=1e-6, atol=1e-9)
    except RuntimeError:  # torch.func does not take some layers, such as a batch norm
        holds = False
    if not holds:
        wrong = "the critic's derivatives do not hold: use each linear layer once, on rows (n, d)"
        raise BadInput(f"{wrong} that do not depend on each other, without dropout")
    last = torch.cat([jacobian.last_inputs, torch.ones(8, 1)], 1)
    dense = jacobian.vjp(torch.eye(8).double())[:, -last.shape[1] :]
    if needs_linear_output and not (dense.shape == last.shape and torch.allclose(dense, last)):
        wrong = "--ihvp nystrom needs a critic whose last layer is nn.Linear(..., 1) with a bias"
        raise BadInput(f"{wrong}; use --ihvp cg")


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
        if args.ihvp != "none":
            check_critic(agent.critic, obs_dim, needs_linear_output=args.ihvp == "nystrom")
        options = {"eps": 1e-5, "fused": True}
        actor_optimiser = torch.optim.Adam(agent.actor_parameters(), args.learning_rate, **options)
        critic_optimiser = torch.optim.Adam(agent.critic.parameters(), args.critic_learning_rate, **options)
        optimisers = [actor_optimiser, critic_optimiser]
        kappa = args.gamma * args.gae_lambda if args.mixed_discount is None else args.mixed_discount
        sketch_generator = torch.Generator()  # its own, so that the solver changes no other random number

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
            sketch_generator.manual_seed(derived_seed(args.seed, iteration))
            rows = b_valid.flatten().nonzero().squeeze(-1)  # transitions; a reset is none
            num_minibatches = max(1, min(args.num_minibatches, len(rows) // 2))
            weights = b_valid / len(rows)  # mean over the transitions
            row_weights = torch.cat([weights, 0 * weights[:1]]).flatten()
            decay, mixed_decay = (x * (1 - b_ended) for x in (args.gamma * args.gae_lambda, kappa))
            states, targets = b_obs[:-1].flatten(0, 1)[rows], returns.flatten()[rows]
            norm_before = inner_gradient_norm(agent.critic, states, targets)
            fallbacks, nested_time, response_time = torch.zeros((), device=device), 0.0, 0.0
            for epoch in range(args.update_epochs):
                statistics = []  # of each minibatch of this epoch; read once, after the update

                # The follower: K passes over the rollout on L = mean (G' - V)^2.
                nested_start = time.perf_counter()
                for _ in range(args.nested_updates):
                    pass_losses = []
                    for part in torch.randperm(len(rows)).to(device).tensor_split(num_minibatches):
                        pair = states[part], targets[part]
                        pass_losses.append(follower_step(agent.critic, critic_optimiser, *pair))
                critic_loss = torch.stack(pass_losses).mean()  # of the last pass
                nested_time += time.perf_counter() - nested_start

                # The advantages of the critic after its K passes.
                response_start = time.perf_counter()
                if args.ihvp != "none":
                    jacobian = CriticJacobian(agent.critic, b_obs.flatten(0, 1))
                    new_values = jacobian.values.view(values.shape)
                else:
                    with torch.no_grad():
                        new_values = agent.critic(b_obs.flatten(0, 1)).view(values.shape)
                refreshed = gae(b_rewards, new_values, b_discounts, decay)

                # The follower's response: z = J_V (H + alpha I)^-1 grad_omega J, and its trace e = W^T z.
                e = torch.zeros_like(weights)
                if args.ihvp != "none":
                    with torch.no_grad():
                        now, _ = agent.logprob_and_entropy(b_obs[:-1].flatten(0, 1), b_actions.flatten(0, 1))
                    ratio = (now.view(shape) - logprobs).exp()
                    # Not over its deviation: the correction's factor 1/std is in its own advantages.
                    centred = refreshed - (weights * refreshed).sum() if args.norm_adv else refreshed
                    slopes = weights * surrogate_slope(ratio, centred, args.clip_coef)
                    u = lambda_returns_vjp(slopes, b_discounts, decay).flatten()  # b = J_V^T u
                    curvature = GaussNewton(jacobian, row_weights)
                    if args.ihvp == "nystrom":
                        choice = args.nystrom_rank, sketch_generator
                        b, v = nystrom_ihvp(curvature, u, args.damping, *choice)
                    else:
                        b, v = cg_ihvp(curvature, u, args.damping, args.cg_iterations)
                    z = b_valid * jacobian.jvp(v).view(values.shape)[:-1]
                    finite = z.sum().isfinite()  # if not, this epoch falls back to the direct gradient
                    e = torch.where(finite, trace(z, mixed_decay), 0.0)
                    fallbacks += ~finite
                response_time += time.perf_counter() - response_start

                # The leader: PPO's minibatches; the correction's gradient is -(grad_theta,omega L) v.
                arrays = b_obs[:-1], b_actions, logprobs, refreshed, advantages, e
                transitions = [array.flatten(0, 1)[rows] for array in arrays]
                for part in torch.randperm(len(rows)).to(device).tensor_split(num_minibatches):
                    minibatch = (array[part] for array in transitions)
                    mb_obs, mb_actions, mb_logprobs, mb_refreshed, mb_advantages, mb_e = minibatch
                    new_logprobs, entropies = agent.logprob_and_entropy(mb_obs, mb_actions)
                    logratio, entropy = new_logprobs - mb_logprobs, entropies.mean()
                    ratio = logratio.exp()
                    if args.norm_adv and len(mb_obs) > 1:
                        std = mb_refreshed.std() + 1e-8
                        mb_refreshed = (mb_refreshed - mb_refreshed.mean()) / std
                        mb_advantages = (mb_advantages - mb_advantages.mean()) / std
                    direct = clipped_surrogate(ratio, mb_refreshed, args.clip_coef).mean()
                    correction = (2 * mb_e * clipped_surrogate(ratio, mb_advantages, args.clip_coef)).mean()
                    loss = -(direct + correction) - args.ent_coef * entropy
                    if epoch == args.update_epochs - 1:
                        with torch.no_grad():
                            clipped = ((ratio - 1).abs() > args.clip_coef).float().mean()
                            old_kl, kl = -logratio.mean(), ((ratio - 1) - logratio).mean()
                            numbers = critic_loss, -direct, entropy, old_kl, kl, clipped
                            statistics.append(torch.stack(numbers))
                    if len(statistics) == num_minibatches:  # the last minibatch of the rollout
                        diagnostics = leader_diagnostics(agent.actor_parameters(), direct, correction, mb_e)
                    actor_optimiser.zero_grad()
                    loss.backward()
                    actor_optimiser.step()
            if args.ihvp != "none":
                residual = curvature.product(v) + args.damping * v - b
                diagnostics["ihvp_residual"] = residual.norm() / b.norm()
                diagnostics["ihvp_cosine"] = torch.cosine_similarity(v, b, dim=0)
            names = "value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac"
            losses = dict(zip((f"losses/{name}" for name in names), torch.stack(statistics).mean(0).tolist()))
            diagnostics["inner_gradient_norm_before"] = norm_before
            diagnostics["inner_gradient_norm_after"] = inner_gradient_norm(agent.critic, states, targets)
            diagnostics["fallbacks"] = fallbacks
            for name, number in diagnostics.items():
                losses[f"bilevel/{name}"] = float(number) if math.isfinite(number) else None
            losses |= {"time/nested_critic": nested_time, "time/response": response_time}

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
