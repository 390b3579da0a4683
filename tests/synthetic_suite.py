"""Suites and committed results made up for the tests of figures, comparisons and page."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from benchmark.data import RunsFile, read_curves, read_runs, write_results
from benchmark.reference import load_reference
from benchmark.suites import Suite

LABELS = {"ppo": "PPO", "nested": "nested control", "blpo": "BLPO", "blpo-cg": "BLPO, CG"}
LABELS |= {f"other-{letter}": f"another {letter}" for letter in "abcdef"}
TASKS = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Humanoid-v4")


def make_suite(
    methods: int = 3, environments: int = 2, seeds: int = 5, script="ppo_continuous.py", **changes
) -> Suite:
    """A suite of the first so many methods and environments."""
    tasks = changes.pop("tasks", TASKS[:environments])
    made = {
        name: {
            "name": name,
            "label": label,
            "script": script,
            "environments": tasks,
            "seeds": tuple(range(seeds)),
        }
        for name, label in list(LABELS.items())[:methods]
    }
    values = {"name": "synthetic", "path": Path("synthetic.toml"), "description": "Made up. With a rule."}
    values |= {"environments": tasks, "methods": made, "grid": 1000, "baselines": ("ppo",)}
    return Suite.model_validate(values | changes)


def make_results(
    suite: Suite,
    folder: Path,
    level: Callable[[str, str], float] = lambda *_: 0.8,
    noise=0.1,
    slower=(),
    points=12,
) -> None:
    """Write runs.json and curves.csv: runs end around the score `level(method, environment)`."""
    runs, curves = [], []
    for number, job in enumerate(suite.jobs()):
        draw = np.random.default_rng(number)
        zero, one = (load_reference()[job.environment][end] for end in ("random", "reference"))
        end = level(job.method, job.environment) + noise * draw.normal()
        steps = np.arange(1, points + 1) * suite.grid
        values = zero + (one - zero) * end * (1 - np.exp(-6 * steps / steps[-1]))
        seconds = 100 * (1 + 0.5 * (job.method in slower)) * (1 + 0.05 * draw.random())
        curves.append(pd.DataFrame({
            "environment": job.environment, "method": job.method, "seed": job.seed, "global_step": steps,
            "wall_time_s": seconds * steps / steps[-1], "episodic_return": values, "episodes": 3,
            "charts/eval_return": values, "losses/actor_gradient_norm": 1.0,
        }))  # fmt: skip
        runs.append({
            "job": job.name, "method": job.method, "environment": job.environment, "seed": job.seed,
            "script": job.script, "command": " ".join(["python", *job.command]), "arguments": {},
            "commit": "0123456789abcdef", "commits": ["0123456789abcdef"], "script_blob": None,
            "dirty": False, "versions": {}, "cpu": "a processor", "gpu": None, "cores": None, "attempts": 1,
            "final_return": zero + (one - zero) * end, "wall_time_s": seconds, "steps": int(steps[-1]),
        })  # fmt: skip
    table = pd.concat(curves).astype(str).astype({"seed": int, "global_step": int})
    write_results(folder / suite.name, RunsFile(suite=suite.name, runs=runs), table)


def edit(suite: Suite, folder: Path, change: Callable[[RunsFile, pd.DataFrame], object]) -> None:
    """Change the committed results: runs.json's content, and curves.csv as texts."""
    content, curves = read_runs(folder / suite.name), read_curves(folder / suite.name, str)
    change(content, curves)
    kept = {run.job for run in content.runs}
    jobs = curves["environment"] + "__" + curves["method"] + "__" + curves["seed"].astype(str)
    write_results(folder / suite.name, content, curves[jobs.isin(kept)])
