"""From run folders to a suite's `curves.csv` and `runs.json` (benchmark/data.py).

A row of curves.csv stands for `grid` steps: the mean return of the episodes that ended in them, how many these
were, the mean of a diagnostic over the iterations in them. Episodes are never taken for runs.
"""

import functools
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydantic

from benchmark import data
from benchmark.data import COLUMNS, RUN, Entry, RunsFile
from benchmark.launch import JobFile, Result, finished_run, job_status
from benchmark.machine import read_as
from benchmark.suites import ROOT, BadSuite, Job, Suite, without

# What may differ between the runs of one method: who and where they are, and what leaves the result as it is.
FREE = {
    "env_id",
    "seed",
    "exp_name",
    "run_dir",
    "device",
    "resume",
    "track",
    "wandb_project_name",
    "wandb_entity",
}
FREE |= {"save_model", "eval_episodes", "capture_video", "checkpoint_every", "env_threads"}
LOADS = ("load_at_start", "load_at_end")
PLAYERS = tuple(f"losses/{name}_loss" for name in ("policy", "actor", "value", "qf"))


class Made(pydantic.BaseModel):
    """What is needed of the args.json of a run folder; scripts that write "-dirty" behind the commit leave
    the machine to the launcher, others write it themselves."""

    args: dict[str, Any]
    commit: str | None = None
    dirty: bool | None = None
    versions: dict[str, str | None] = {}
    cpu: str | None = None
    gpu: str | None = None


def collect(suite: Suite, run_dir: Path, folder: Path, allow_mixed: bool = False) -> RunsFile:
    """Write the suite's files into `folder` and return the content of runs.json.

    A job whose run folder is not here keeps what an earlier collection of this suite wrote. Raises BadSuite,
    before anything is written, if another suite file wrote the folder, if a file is damaged, and, unless
    `allow_mixed`, for runs of several commits, of uncommitted code or of other arguments than the suite's.
    """
    before = data.own_runs(suite, folder) or RunsFile(suite=suite.name)
    earlier = {run.job: run for run in before.runs}
    known = data.read_curves(folder, str) if earlier else pd.DataFrame(columns=COLUMNS)
    content, curves, commands = RunsFile(suite=suite.name, file=data.suite_file(suite)), [], []
    for job in suite.jobs():
        source = finished_run(run_dir / suite.name / job.name)
        if source is not None:
            content.runs.append(describe(run_dir / suite.name / job.name, source))
            curves.append(curve(job, source, suite))
        elif job.name in earlier:
            content.runs.append(earlier[job.name])
            curves.append(known[(known[RUN] == [job.environment, job.method, job.seed]).all(axis=1)])
        else:
            content.missing.append(job.name)
            if did_fail(run_dir / suite.name / job.name, job.name in before.failed):
                content.failed.append(job.name)
            continue
        commands.append(job.command)
    if not content.runs:
        raise BadSuite(
            f"{suite.name}: no run in {run_dir / suite.name} has finished; --run-dir says where they are"
        )
    content.mixed = mixtures(content.runs, commands, suite.restated)
    if content.mixed and not allow_mixed:
        raise BadSuite(
            f"{suite.name} mixes {'; '.join(content.mixed)}; run the rest again, or say --allow-mixed"
        )
    table = pd.concat(curves, ignore_index=True)
    diagnostics = [name for name in suite.diagnostics if name in table]
    data.write_results(folder, content, table[[*COLUMNS, *diagnostics]].fillna(""))
    return content


def did_fail(job_folder: Path, before: bool) -> bool:
    """Whether a job that has not finished ended with an error; as known before, if its folder is not here."""
    return job_status(job_folder) == "failed" if job_folder.exists() else before


# ---- One run ---------------------------------------------------------------------------------------------
def needed(model, path: Path):
    """A json file as that model. Raises BadSuite if it is not there or damaged."""
    found = read_as(model, path)
    if found is None:
        raise BadSuite(f"{path} is missing; remove that folder to run the job again")
    return found


def read_cells(path: Path, *columns: str) -> pd.DataFrame:
    """A csv file, those columns as numbers and the other cells as text. Raises BadSuite if that cannot be."""
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False).astype(dict.fromkeys(columns, float))
    except (OSError, ValueError, KeyError) as error:
        advice = "remove that run folder to run the job again"
        raise BadSuite(f"{path} cannot be read: {error}; {advice}") from None


def numbers(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells of text as numbers, empty ones as nan."""
    return cells.replace("", "nan").astype(float)


def describe(job_folder: Path, run: Path) -> Entry:
    """Where a finished run came from, and what came out."""
    job, made = needed(JobFile, job_folder / "job.json"), needed(Made, run / "args.json")
    result = needed(Result, run / "result.json")
    by_hand = {"commit": made.commit and made.commit.removesuffix("-dirty"), "cpu": made.cpu, "gpu": made.gpu}
    by_hand["dirty"] = (made.commit or "").endswith("-dirty") if made.dirty is None else made.dirty
    attempts = job.attempts or [by_hand]
    commits = list(dict.fromkeys(attempt["commit"] for attempt in attempts))
    last = attempts[-1]
    return Entry(
        **job.model_dump(include={"job", "method", "environment", "seed"}),
        script=job.command[0],
        command=" ".join(["python", *job.command]),
        arguments={name: value for name, value in made.args.items() if name not in FREE},
        commit=commits[-1],
        commits=commits,
        script_blob=blob(commits[-1], job.command[0]),
        dirty=any(attempt["dirty"] for attempt in attempts),
        versions=made.versions or last.get("versions", {}),
        cpu=made.cpu or last["cpu"],
        gpu=made.gpu or last["gpu"],
        cores=last.get("cores"),
        attempts=len(job.attempts),
        load=max(
            (each[key] for each in attempts for key in LOADS if each.get(key) is not None), default=None
        ),
        final_return=result.final_return,
        diverged=result.status == "diverged" or diverged(run, result.final_return),
        wall_time_s=None if result.status == "diverged" else result.wall_time_s,
        steps=result.global_step,
    )


def diverged(run: Path, final_return: float | None) -> bool:
    """Whether training ended with parameters that are not finite: the return is not, or a player's last loss.

    The return alone does not tell: of logits that are nan argmax takes the first, and a simulator goes on so.
    """
    last = read_cells(run / "metrics.csv").tail(1)
    losses = numbers(last[[name for name in PLAYERS if name in last]])
    returned = final_return is None or math.isfinite(final_return)
    return not (returned and np.isfinite(losses).all(axis=None))


@functools.cache
def blob(commit: str | None, script: str) -> str | None:
    """Git's name for the content of a script at a commit: equal names, equal code; None if git cannot tell."""
    ask = ["git", "rev-parse", f"{commit}:{script}"]
    try:
        done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def curve(job: Job, run: Path, suite: Suite) -> pd.DataFrame:
    """The rows of a run in curves.csv; a diagnostic that its script does not log is left out.

    A run that ended early, since it diverged, has rows up to all the steps that it should have made.
    """
    metrics = read_cells(run / "metrics.csv", "global_step", "wall_time_s")
    episodes = read_cells(run / "episodes.csv", "global_step", "episodic_return")
    end, total = metrics["global_step"].max(), needed(Made, run / "args.json").args["total_timesteps"]
    if needed(Result, run / "result.json").status == "diverged":
        end = total
    points = range(suite.grid, math.ceil(end / suite.grid) * suite.grid + 1, suite.grid)
    bins = [
        np.ceil(table["global_step"] / suite.grid).astype(int) * suite.grid for table in (metrics, episodes)
    ]
    rows = pd.DataFrame({name: getattr(job, name) for name in RUN} | {"global_step": points})
    times = np.interp(points, [0, *metrics["global_step"]], [0, *metrics["wall_time_s"]])
    rows["wall_time_s"] = times.round(2).astype(str)
    returns = episodes.groupby(bins[1])["episodic_return"].agg(["mean", "size"]).reindex(points)
    rows["episodic_return"] = [f"{round(value, 3)}" if value == value else "" for value in returns["mean"]]
    rows["episodes"] = returns["size"].fillna(0).astype(int).astype(str).to_numpy()
    cells = metrics[[name for name in suite.diagnostics if name in metrics]]
    values = numbers(cells)
    means = values.groupby(bins[0]).mean().map("{:.5g}".format)
    broken = values.isna() & (cells != "")  # not finite in an iteration
    means = means.mask(broken.groupby(bins[0]).any(), "nan").where((cells != "").groupby(bins[0]).any(), "")
    return rows.join(means.reindex(points, fill_value=""), on="global_step")


# ---- Runs that should not be put into one table ----------------------------------------------------------
def mixtures(runs: list[Entry], commands: list[list[str]], restated: tuple[str, ...] = ()) -> list[str]:
    """What keeps the runs from one table, each as a phrase. Commands, of the runs and of the suite now, are
    compared without the arguments that are `restated`."""
    problems = []
    commits = sorted({commit or "none" for run in runs for commit in run.commits})
    if len(commits) > 1:
        scripts = {(run.script, run.script_blob) for run in runs}
        same = len(scripts) == len({script for script, _ in scripts}) and None not in {
            name for _, name in scripts
        }
        words = " (the scripts themselves are the same in all of them)" if same else ""
        problems.append(f"the commits {', '.join(commit[:10] for commit in commits)}{words}")
    dirty = [run.job for run in runs if run.dirty]
    if dirty:
        problems.append(f"runs of uncommitted code ({', '.join(dirty)})")
    for run, command in zip(runs, commands, strict=True):
        if without(restated, run.command.split()) != without(restated, ["python", *command]):
            problems.append(f"a run with other arguments than the suite's now ({run.job}: {run.command})")
    groups: dict[tuple[str, str], dict[str, Entry]] = {}
    for run in runs:
        key = json.dumps(run.arguments, sort_keys=True)
        groups.setdefault((run.method, run.environment), {}).setdefault(key, run)
    for (method, environment), settings in groups.items():
        first, *others = settings.values()
        for other in others[:1]:
            names = first.arguments.keys() | other.arguments.keys()
            differing = sorted(
                each for each in names if first.arguments.get(each) != other.arguments.get(each)
            )
            jobs = f"{first.job} and {other.job}"
            problems.append(
                f"runs of {method} on {environment} with different {', '.join(differing)} ({jobs})"
            )
    return problems
