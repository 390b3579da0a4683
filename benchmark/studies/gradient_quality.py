"""How good is the hypergradient as a gradient? Frozen policies on real tasks, nothing learns.

    python -m benchmark.studies.gradient_quality --workers 2 --results-dir benchmark/results/gradient_quality

**Policies.** For each task two PPO runs (constant step sizes), frozen at ten stages: twenty policies.

**References**, from at least `--reference-steps` fresh steps of each policy, with Monte Carlo advantages A
(lambda = 1) over a critic of width 64 that was fitted on other steps: it lowers the variance and adds no bias
but for the bootstraps of episodes that were cut. With t the steps since the start of the episode:
    start     sum_t gamma^t A_t grad log pi_t: the gradient of an episode's expected discounted return
    visited   sum_t (1 + gamma + ... + gamma^t) A_t grad log pi_t: of the mean of V over the states that the
              policy visits, held fixed; what BLPO's leader is after with kappa = gamma
    plain     sum_t A_t grad log pi_t: PPO's direction, the gradient of nothing
Their standard errors come from eight groups of environments.

**Estimates.** Critics of width 1, 4 and 64 are fitted to each policy, so they differ in size alone. From a
batch of fresh steps, 2,048 (8 environments x 256) or 20,480 (32 x 640), the critic makes K steps on its
targets, lambda-returns with lambda .95 or 1; the leader, with returns of its own lambda, has
    direct     sum_t A_t grad log pi_t with the advantages of the critic that has just answered
    own start  the total derivative with kappa = 0
    total      with kappa = gamma times the targets' lambda: row weights 1 + 2 e, the script's formulas
    constant   e replaced by its mean over the batch
    permuted   e shuffled over the batch
(H + I)^-1 by 10 steps of conjugate gradients. Numbers: the cosine between estimate and reference, mean over
the batches of a policy; and the relative squared error |c g - r|^2 / |r|^2 with the best factor c for all
batches of a policy, since Adam takes no notice of a factor.

**The rule, written before the first run.** In a setting (leader's lambda, targets, K, width, batch) the
hypergradient *matters* on a task if the cosine of `total` with `start` is above that of `direct` and above
that of `constant`, each with a 95 % interval of the paired difference over the policies (bootstrap, 10,000
resamples) above 0; `permuted` is reported beside. It matters as the method is run if it does so at leader's
lambda .95, targets .95, K = 3, width 64, 2,048 steps; and where the theory says if it does so at leader's
lambda 0, targets 1, K = 30, width 1, 20,480 steps; on how many of the tasks is the answer. The same is
given for `visited`, judged apart, since that is the total derivative's objective by its definition.
"""

import copy
import gzip
import importlib
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

import blpo_continuous as blpo
from benchmark.machine import provenance, write_atomically
from benchmark.studies import study

ROOT = Path(__file__).parents[2]
# Steps between two stages of a run: the last one is where the task is nearly learned, or half of it.
TASKS = {
    "Hopper-v4": 50_000, "Walker2d-v4": 50_000, "HalfCheetah-v4": 50_000, "CartPole-v1": 5_120,
    "Pendulum-v1": 20_480,
}  # fmt: skip
STAGES, SEEDS, WIDTHS = 10, (701, 702), (1, 4, 64)
LEADERS, TARGETS, NESTED = (0.0, 0.5, 0.95, 1.0), (0.95, 1.0), (3, 30)
ARMS = ("direct", "own start", "total", "constant", "permuted")
REFERENCES = ("start", "visited", "plain")
BATCHES = {2048: (8, 256, 8), 20480: (32, 640, 2)}  # environments, steps, how many of them
DAMPING, CG, GROUPS = 1.0, 10, 8
COLUMNS = "task,seed,stage,width,batch,targets,K,leader,arm,reference,cosine,error".split(",")
DESCRIPTION = ["task", "seed", "stage", "commit", "return", "rows"]
DESCRIPTION += ["start_error", "visited_error", "plain_error", "cg_residual"]


Stage = Annotated[int, Field(ge=1, le=STAGES)]


class Args(study.Args):
    """The policies, and where their numbers are kept."""

    tasks: Annotated[tuple[Literal[*TASKS], ...], study.AT_LEAST_ONE] = tuple(TASKS)
    """the tasks"""
    stages: Annotated[tuple[Stage, ...], study.AT_LEAST_ONE] = tuple(range(1, STAGES + 1))
    """stages of each run"""
    seeds: Annotated[tuple[study.Seed, ...], study.AT_LEAST_ONE] = SEEDS
    """seeds of the PPO runs, which no suite reports"""
    reference_steps: Annotated[int, Field(ge=10_000, le=10**8)] = 500_000
    """fresh steps for the reference gradients of each policy"""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """policies at a time, one core each"""
    run_dir: Path = ROOT / "runs" / "gradient_quality"
    """policies and the numbers of each; what is there is not made again"""


# ---- Policies ----------------------------------------------------------------------------------------
def script_of(task: str):
    """The PPO script of a task, as a module."""
    return importlib.import_module("ppo_discrete" if task == "CartPole-v1" else "ppo_continuous")


def make_policies(task: str, seed: int, stages: int, folder: Path) -> list[Path]:
    """Checkpoints of one PPO run at its stages; a run that was begun goes on."""
    paths = [folder / f"{task}__{seed}__{stage}.pt" for stage in range(1, stages + 1)]
    script = Path(script_of(task).__file__)
    for stage, path in enumerate(paths, 1):
        if path.exists():
            continue
        runs = sorted(folder.glob(f"{task}__policies__{seed}__*"))
        words = ["--resume", runs[-1]] if runs else ["--env-id", task, "--seed", seed, "--no-anneal-lr"]
        words += ["--exp-name", "policies", "--run-dir", folder, "--env-threads", 1] if not runs else []
        command = [sys.executable, script, *words, "--total-timesteps", stage * TASKS[task]]
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{task}, seed {seed}, stage {stage}: {done.stderr[-1000:]}")
        run = sorted(folder.glob(f"{task}__policies__{seed}__*"))[-1]
        write_atomically(path, lambda new: new.write_bytes((run / "checkpoint.pt").read_bytes()))
    return paths


class Fragment:
    """Steps of a frozen policy, arrays (T, N): what the training loop has of a rollout, on the CPU.

    obs (T+1, N, D) normalised, actions, rewards scaled, discounts = gamma (1 - terminated), ended, valid, and
    t, the steps since the start of the episode.
    """

    def __init__(self, obs, actions, rewards, discounts, ended, valid, t):
        self.obs, self.actions, self.rewards, self.discounts = obs, actions, rewards, discounts
        self.ended, self.valid, self.t = ended, valid, t

    def part(self, steps: slice, envs: slice) -> "Fragment":
        """Some of its steps and environments."""
        ends = slice(steps.start, steps.stop + 1)
        rest = self.actions, self.rewards, self.discounts, self.ended, self.valid, self.t
        return Fragment(self.obs[ends, envs], *(x[steps, envs] for x in rest))

    def advantages(self, critic: torch.nn.Module, lambda_: float, gamma: float) -> tuple[Tensor, Tensor]:
        """GAE (T, N) and the lambda-returns (T, N), of this critic."""
        with torch.no_grad():
            values = critic(self.obs.flatten(0, 1)).view(self.obs.shape[:2])
        decay = gamma * lambda_ * (1 - self.ended)
        advantages = blpo.gae(self.rewards, values, self.discounts, decay)
        return advantages, advantages + values[:-1]


def collect(script, saved: dict, task: str, steps: int, num_envs: int, seed: int) -> tuple[Fragment, float]:
    """A fragment of the frozen policy in `saved`, from fresh episodes; the mean return of those that end."""
    args = script.Args(env_id=task, num_envs=num_envs, env_threads=1, num_steps=2, num_minibatches=1)
    envs, _, action_space = script.make_envs(args, seed)
    agent = script.Agent(*saved["agent_sizes"])
    agent.load_state_dict(saved["agent"])
    agent.set_action_space(action_space)
    (mean, variance, _), (_, scale, _) = ([x.numpy() for x in each] for each in saved["normalisers"])
    torch.manual_seed(seed)

    def normalise(raw: np.ndarray) -> np.ndarray:
        return ((raw.astype(np.float64) - mean) / np.sqrt(variance + 1e-8)).clip(-10, 10)

    shape = steps, num_envs
    obs = np.zeros((steps + 1, num_envs, len(mean)), dtype=np.float32)
    rewards, terminated, ended, valid, t = (np.zeros(shape, dtype=np.float32) for _ in range(5))
    obs[0], was, clock = normalise(envs.reset()[0]), np.zeros(num_envs, dtype=bool), np.zeros(num_envs)
    actions, totals, returns = [], np.zeros(num_envs), []
    for step in range(steps):
        with torch.no_grad():
            actions.append(agent.sample(torch.from_numpy(obs[step]), agent.noise(num_envs)))
            task_actions = agent.task_actions(actions[-1]).numpy()
        raw, reward, ends, cut, _ = envs.step(task_actions)
        valid[step], t[step] = ~was, clock
        totals += reward * ~was
        rewards[step] = (np.where(was, 0.0, reward) / np.sqrt(scale + 1e-8)).clip(-10, 10)
        clock = np.where(was, 0, clock + 1)
        was = ends | cut
        terminated[step], ended[step], obs[step + 1] = ends, was, normalise(raw)
        for index in was.nonzero()[0]:
            returns.append(totals[index])
            totals[index] = 0
    envs.close()
    arrays = [torch.from_numpy(x) for x in (obs, rewards, args.gamma * (1 - terminated), ended, valid, t)]
    arrays.insert(1, torch.stack(actions))
    return Fragment(*arrays), float(np.mean(returns)) if returns else float("nan")


def fitted_critic(fragment: Fragment, width: int, gamma: float, seed: int) -> torch.nn.Module:
    """A critic of that width fitted to a policy: five rounds of lambda-returns (.95), five epochs each."""
    torch.manual_seed(seed)
    obs_dim = fragment.obs.shape[-1]
    critic = blpo.Agent(obs_dim, 1, critic_width=width).critic
    optimiser = torch.optim.Adam(critic.parameters(), 2.8e-3, eps=1e-5, fused=True)
    rows = fragment.valid.flatten().nonzero().squeeze(-1)
    for _ in range(5):
        targets = fragment.advantages(critic, 0.95, gamma)[1].flatten()[rows]
        states = fragment.obs[:-1].flatten(0, 1)[rows]
        for part in torch.cat([torch.randperm(len(rows)) for _ in range(5)]).split(512):
            blpo.follower_step(critic, optimiser, states[part], targets[part])
    return critic


# ---- Gradients ---------------------------------------------------------------------------------------
class Logprob(torch.nn.Module):
    """log pi(a|s) as a module from rows (n, D + A), observations beside actions, to (n, 1): one number a row,
    so that the script's `CriticJacobian` gives its products."""

    def __init__(self, agent: torch.nn.Module, obs_dim: int, discrete: bool):
        super().__init__()
        self.agent, self.obs_dim, self.discrete = copy.deepcopy(agent), obs_dim, discrete
        self.agent.critic = torch.nn.Identity()  # its weights are none of the policy's

    def forward(self, rows: Tensor) -> Tensor:
        """(n, D + A) -> (n, 1)."""
        actions = rows[:, self.obs_dim :]
        actions = actions[:, 0].long() if self.discrete else actions
        return self.agent.logprob_and_entropy(rows[:, : self.obs_dim], actions)[0][:, None]


def policy_gradients(agent: torch.nn.Module, fragment: Fragment, slopes: Tensor) -> Tensor:
    """sum_t slopes_t grad log pi_t for m sets of slopes (m, T, N) -> (m, P)."""
    obs, actions = fragment.obs[:-1].flatten(0, 1), fragment.actions.flatten(0, 1)
    discrete = actions.ndim == 1
    rows = torch.cat([obs, actions[:, None].to(obs) if discrete else actions], 1)
    jacobian = blpo.CriticJacobian(Logprob(agent, obs.shape[1], discrete), rows)
    return torch.cat([jacobian.vjp(some) for some in slopes.flatten(1).split(8)])


def references(agent, fragment: Fragment, critic: torch.nn.Module, gamma: float) -> tuple[Tensor, Tensor]:
    """The reference gradients (3, P), means over the transitions, and their relative standard errors (3,)."""
    advantages = fragment.advantages(critic, 1.0, gamma)[0] * fragment.valid
    decayed = gamma**fragment.t
    weights = torch.stack([decayed, (1 - gamma * decayed) / (1 - gamma), torch.ones_like(decayed)])
    envs = fragment.valid.shape[1]
    groups = []
    for one in torch.arange(envs).tensor_split(GROUPS):
        part = slice(int(one[0]), int(one[-1]) + 1)
        sums = 0
        for start in range(0, len(fragment.valid), 512):  # a few steps at a time, for the memory
            steps = slice(start, min(start + 512, len(fragment.valid)))
            slopes = (weights * advantages)[:, steps, part]
            sums = sums + policy_gradients(agent, fragment.part(steps, part), slopes)
        groups.append(sums / fragment.valid[:, part].sum())
    groups = torch.stack(groups)
    mean = groups.mean(0)
    error = (groups - mean).square().sum((0, 2)).div(GROUPS * (GROUPS - 1)).sqrt()
    return mean, error / mean.norm(dim=1)


def estimates(agent, batch: Fragment, fitted: torch.nn.Module, gamma: float, generator) -> tuple[dict, float]:
    """(targets, K, leader, arm) -> gradient (P,) from one batch, and the largest relative residual.

    The script's formulas at the first minibatch of a rollout, where every ratio is 1: A centred and over its
    standard deviation, the mixed term with the targets' own advantages, centred, over the same one.
    """
    valid = batch.valid
    weights = valid / valid.sum()
    row_weights = torch.nn.functional.pad(weights, (0, 0, 0, 1)).flatten()
    inside, rows = valid > 0, valid.flatten().nonzero().squeeze(-1)
    decays = [gamma * leader * (1 - batch.ended) for leader in LEADERS]
    u = [blpo.lambda_returns_vjp(weights, batch.discounts, decay).flatten() for decay in decays]
    keys, slopes, worst = [], [], 0.0
    for target in TARGETS:
        mixed, returns = batch.advantages(fitted, target, gamma)
        mixed = mixed - (weights * mixed).sum()
        critic, done = copy.deepcopy(fitted), 0
        optimiser = torch.optim.Adam(critic.parameters(), 2.8e-3, eps=1e-5, fused=True)
        states, returns = batch.obs[:-1].flatten(0, 1)[rows], returns.flatten()[rows]
        mixed_decay = gamma * target * (1 - batch.ended)
        for nested in NESTED:
            while done < nested:
                blpo.follower_step(critic, optimiser, states, returns)
                done += 1
            jacobian = blpo.CriticJacobian(critic, batch.obs.flatten(0, 1))
            curvature = blpo.GaussNewton(jacobian, row_weights)
            for leader, one in zip(LEADERS, u):
                b, v = blpo.cg_ihvp(curvature, one, DAMPING, CG)
                residual = curvature.product(v) + DAMPING * v - b
                worst = max(worst, float(residual.norm() / b.norm()))
                own_start = valid * jacobian.jvp(v).view(-1, valid.shape[1])[:-1]
                total = blpo.trace(own_start, mixed_decay)
                direct = batch.advantages(critic, leader, gamma)[0]
                direct = direct - (weights * direct).sum()
                std = (weights * direct**2).sum().sqrt() + 1e-8
                permuted = total.clone()
                permuted[inside] = total[inside][torch.randperm(len(rows), generator=generator)]
                constant = torch.full_like(total, float((weights * total).sum()))
                for arm, trace in zip(ARMS, (0 * total, own_start, total, constant, permuted)):
                    keys.append((target, nested, leader, arm))
                    slopes.append(weights * (direct + 2 * trace * mixed) / std)
    gradients = policy_gradients(agent, batch, torch.stack(slopes))
    return dict(zip(keys, gradients)), worst


# ---- One policy --------------------------------------------------------------------------------------
def measure_policy(task: str, seed: int, stage: int, path: Path, reference_steps: int) -> tuple[list, list]:
    """The rows of one policy (COLUMNS) and its description (DESCRIPTION)."""
    torch.set_num_threads(1)
    script, saved = script_of(task), torch.load(path, weights_only=True)
    gamma, start = script.Args().gamma, 1000 * (100 * seed + stage)
    agent = script.Agent(*saved["agent_sizes"])
    agent.load_state_dict(saved["agent"])
    fit, _ = collect(script, saved, task, 640, 64, start)
    fresh, _ = collect(script, saved, task, 640, 64, start + 100)
    long, mean_return = collect(script, saved, task, -(-reference_steps // 64), 64, start + 200)
    critics = {width: fitted_critic(fit, width, gamma, seed) for width in WIDTHS}
    truth, errors = references(agent, long, critics[64], gamma)
    generator, rows, worst = torch.Generator().manual_seed(seed), [], 0.0
    for width in WIDTHS:
        for size, (envs, steps, number) in BATCHES.items():
            found: dict = {}
            places = [(t, n) for t in range(0, 640 - steps + 1, steps) for n in range(0, 64, envs)]
            for t, n in places[:number]:
                part = fresh.part(slice(t, t + steps), slice(n, n + envs))
                gradients, residual = estimates(agent, part, critics[width], gamma, generator)
                worst = max(worst, residual)
                for key, gradient in gradients.items():
                    found.setdefault(key, []).append(gradient)
            for key, gradients in found.items():
                g = torch.stack(gradients)
                for name, r in zip(REFERENCES, truth):
                    products = g @ r
                    cosine = (products / (g.norm(dim=1) * r.norm())).mean()
                    error = 1 - products.mean() ** 2 / (g.square().sum(1).mean() * r.square().sum())
                    rows.append([task, seed, stage, width, size, *key, name, float(cosine), float(error)])
    described = [task, seed, stage, provenance()["commit"], mean_return, int(long.valid.sum())]
    return rows, [*described, *errors.tolist(), worst]


def measured_once(task: str, seed: int, stage: int, path: Path, reference_steps: int) -> None:
    """Measure a policy and write its numbers beside it, unless they are there."""
    output = path.with_suffix(f".{reference_steps}.json")
    if not output.exists():
        rows, described = measure_policy(task, seed, stage, path, reference_steps)
        content = json.dumps({"rows": rows, "policy": described})
        write_atomically(output, lambda new: new.write_text(content))


# ---- Tables, verdicts and the figure -----------------------------------------------------------------
def interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean of paired differences (policies,) and its 95 % bootstrap interval, 10,000 resamples."""
    draws = np.random.default_rng(seed).integers(len(differences), size=(10_000, len(differences)))
    low, high = np.quantile(differences[draws].mean(1), [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def verdicts(rows: list[list]) -> list[dict]:
    """A row for each task and setting: mean cosines of the arms, total minus direct and minus constant with
    their intervals, and whether the hypergradient matters there by the rule."""
    cosines: dict = {}
    for task, seed, stage, width, size, target, nested, leader, arm, reference, cosine, _ in rows:
        key = task, reference, leader, target, nested, width, size
        cosines.setdefault(key, {}).setdefault(arm, {})[seed, stage] = cosine
    names = "task,reference,leader,targets,K,width,batch".split(",")
    table = []
    for key, arms in sorted(cosines.items(), key=str):
        values = {arm: np.array([found[each] for each in sorted(found)]) for arm, found in arms.items()}
        row = dict(zip(names, key)) | {"policies": len(values["total"])}
        row |= {arm: float(values[arm].mean()) for arm in ARMS}
        lows = []
        for other in ("direct", "constant", "permuted"):
            mean, low, high = interval(values["total"] - values[other])
            row[f"total - {other}"] = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
            lows.append(low)
        table.append(row | {"matters": "yes" if min(lows[:2]) > 0 else "no"})
    return table


def draw(table: list[dict]) -> bytes:
    """A png: cosine with `start` by the critic's width, a panel a task and leader's lambda, a line an arm."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in table)]
    figure = Figure(figsize=(3 * len(tasks), 5.6), layout="constrained")
    panels = figure.subplots(2, len(tasks), sharex=True, sharey=True, squeeze=False)
    fixed = {"reference": "start", "targets": 1.0, "K": 30, "batch": 20480}
    for line, leader in enumerate((0.0, 0.95)):
        for column, task in enumerate(tasks):
            panel, wanted = panels[line][column], fixed | {"task": task, "leader": leader}
            chosen = [row for row in table if all(row[name] == value for name, value in wanted.items())]
            chosen.sort(key=lambda row: row["width"])
            for arm, style in zip(ARMS, ("k-o", None, "C0-o", "C1--s", "C3:d")):
                if style:
                    numbers = [row[arm] for row in chosen]
                    panel.plot([str(row["width"]) for row in chosen], numbers, style, label=arm)
            panel.set_title(f"{task}, leader's λ {leader:g}, n = {chosen[0]['policies']}", fontsize=9)
            if line:
                panel.set_xlabel("width of the critic")
        panels[line][0].set_ylabel("cosine with the gradient\nof the discounted return")
    panels[0][0].legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png")
    return content.getvalue()


SETTINGS = {
    "as the method is run": {"leader": 0.95, "targets": 0.95, "K": 3, "width": 64, "batch": 2048},
    "where the theory says": {"leader": 0.0, "targets": 1.0, "K": 30, "width": 1, "batch": 20480},
}


def answers(table: list[dict]) -> list[dict]:
    """On which of the tasks the hypergradient matters, by the rule."""
    rows = []
    for (words, setting), reference in itertools.product(SETTINGS.items(), ("start", "visited")):
        wanted = setting | {"reference": reference}
        chosen = [row for row in table if all(row[name] == value for name, value in wanted.items())]
        yes = [row["task"] for row in chosen if row["matters"] == "yes"]
        numbers = {"tasks": len(chosen), "matters on": len(yes), "which": ", ".join(yes)}
        rows.append({"setting": words, "reference": reference} | numbers)
    return rows


def measure(args: Args) -> Iterator[tuple[str, list[study.Row] | bytes]]:
    """Make the policies, measure them, give the tables and the figure; what is there is not made again."""
    args.run_dir.mkdir(parents=True, exist_ok=True)
    jobs = [(task, seed) for task in args.tasks for seed in args.seeds]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        making = {pool.submit(make_policies, *job, max(args.stages), args.run_dir): job for job in jobs}
        policies = []
        for each in tqdm(as_completed(making), total=len(jobs), desc="PPO runs"):
            made = dict(enumerate(each.result(), 1))
            policies += [(*making[each], stage, made[stage]) for stage in sorted(set(args.stages))]
        policies.sort(key=lambda one: (one[2] % 2, one[1], one[2]))  # some of each task first
        measuring = [pool.submit(measured_once, *one, args.reference_steps) for one in policies]
        for each in tqdm(as_completed(measuring), total=len(measuring), desc="policies"):
            each.result()
    numbers = [path.with_suffix(f".{args.reference_steps}.json") for *_, path in sorted(policies)]
    contents = [json.loads(path.read_text()) for path in numbers]
    rows = [row for each in contents for row in each["rows"]]
    table = verdicts(rows)
    yield "policies", [dict(zip(DESCRIPTION, each["policy"])) for each in contents]
    yield "verdicts", table
    yield "answers", answers(table)
    text = pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False, float_format="%.5f")
    yield "cosines.csv.gz", gzip.compress(text.encode(), mtime=0)
    yield "gradient_quality.png", draw(table)


if __name__ == "__main__":
    study.command(Args, measure, __file__, __doc__)
