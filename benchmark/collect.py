"""From run folders to `benchmark/results/SUITE/`: one small csv file a run, and where each came from.

    JOB.csv      global_step, wall_time_s, episodic_return, episodes, and the suite's diagnostics; one row for each
                 `grid` steps: the mean return of the episodes that ended in them, how many these were, the mean of a
                 diagnostic over the iterations in them. A cell is empty where there is nothing to average.
    runs.json    command, commit, versions, machine, attempts, load, final return, wall-clock time (none of a run that
                 stopped because it diverged) of every run; the jobs missing, and those of them that failed

Figures drawn from earlier csv files are removed: `python -m benchmark plot SUITE` draws them anew.
"""

import csv
import json
import math
import subprocess
from pathlib import Path

import numpy as np

from benchmark.launch import finished_run, job_status, run_status
from benchmark.machine import write_atomically
from benchmark.suites import RESULTS, ROOT, BadSuite, Suite, read_json, without

# What may differ between the runs of one method: who and where they are, and what leaves the result as it is.
FREE = {"env_id", "seed", "exp_name", "run_dir", "device", "resume", "track", "wandb_project_name", "wandb_entity"}
FREE |= {"save_model", "eval_episodes", "capture_video", "checkpoint_every", "env_threads"}


class Mixed(BadSuite):
    """Runs that should not be put into one table."""


def collect(suite: Suite, run_dir: Path, results: Path = RESULTS, allow_mixed: bool = False) -> dict:
    """Write the suite's files under `results` and return the content of runs.json.

    A job whose run folder is not here keeps what an earlier collection committed, if its command is still the same.
    Raises Mixed, before anything is written, for runs of several commits, of uncommitted code or of other arguments
    than the suite's, unless `allow_mixed`.
    """
    folder = results / suite.name
    before = read_json(folder / "runs.json") or {}
    earlier = {run["job"]: run for run in before.get("runs", [])}
    runs, curves, missing, failed = [], {}, [], []
    for job in suite.jobs():
        source = finished_run(run_dir / suite.name / job.name)
        if source is not None:
            runs.append(describe(run_dir / suite.name / job.name, source))
            curves[job.name] = curve(source, suite.grid, suite.diagnostics)
        elif job.name in earlier and (folder / f"{job.name}.csv").exists():
            runs.append(earlier[job.name])
        else:
            missing.append(job.name)
            if did_fail(run_dir / suite.name / job.name, job.name in before.get("failed", [])):
                failed.append(job.name)
            continue
        runs[-1]["suite_command"] = job.command
    problems = mixtures(runs, suite.restated)
    if problems and not allow_mixed:
        raise Mixed(f"{suite.name} mixes {'; '.join(problems)}; run the rest again, or say --allow-mixed")
    for run in runs:
        del run["suite_command"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, (header, rows) in curves.items():
        write_csv(folder / f"{name}.csv", header, rows)
    for path in folder.glob("*.csv"):  # of jobs that the suite no longer has
        if path.stem not in {run["job"] for run in runs}:
            path.unlink()
    for path in (*folder.glob("*.png"), *folder.glob("*.pdf")):
        path.unlink()
    content = {"suite": suite.name, "mixed": problems, "missing": missing, "failed": failed, "runs": runs}
    write_atomically(folder / "runs.json", lambda new: new.write_text(json.dumps(content, indent=1) + "\n"))
    return content


def did_fail(job_folder: Path, before: bool) -> bool:
    """Whether a job that has not finished ended with an error; what was known before, if its folder is not here."""
    return job_status(job_folder) == "failed" if job_folder.exists() else before


def describe(job_folder: Path, run: Path) -> dict:
    """Where a finished run came from, and what came out."""
    job, made, result = (read_json(path) for path in (job_folder / "job.json", run / "args.json", run / "result.json"))
    attempts = job["attempts"] or [origin(made)]
    commits = list(dict.fromkeys(attempt["commit"] for attempt in attempts))
    script = job["command"][0]
    return {
        "job": job["job"],
        "method": job["method"],
        "environment": job["environment"],
        "seed": job["seed"],
        "script": script,
        "command": " ".join(["python", *job["command"]]),
        "arguments": {name: value for name, value in made["args"].items() if name not in FREE},
        "commit": commits[-1],
        "commits": commits,
        "script_blob": blob(commits[-1], script),
        "dirty": any(attempt["dirty"] for attempt in attempts),
        "versions": made["versions"],
        "cpu": made.get("cpu", attempts[-1]["cpu"]),
        "gpu": made.get("gpu", attempts[-1]["gpu"]),
        "cores": attempts[-1].get("cores"),
        "attempts": len(job["attempts"]),
        "load": max((each[key] for each in attempts for key in LOADS if each.get(key) is not None), default=None),
        "final_return": result["final_return"],
        "diverged": result["status"] == "diverged" or diverged(run, result["final_return"]),
        "wall_time_s": None if result["status"] == "diverged" else result["wall_time_s"],  # it made fewer steps
        "steps": result["global_step"],
    }


def origin(made: dict) -> dict:
    """Where a run that was started by hand came from, by its args.json: scripts that write "-dirty" behind the commit leave
    the machine to the launcher, the others write it themselves."""
    commit = made["commit"]
    dirty = made.get("dirty", commit is not None and commit.endswith("-dirty"))
    found = {"commit": commit and commit.removesuffix("-dirty"), "dirty": dirty}
    return found | {name: made.get(name) for name in ("cpu", "gpu")}


LOADS = ("load_at_start", "load_at_end")
PLAYERS = tuple(f"losses/{name}_loss" for name in ("policy", "actor", "value", "qf"))


def diverged(run: Path, final_return: float | None) -> bool:
    """Whether training ended with parameters that are not finite: the return, or a player's loss in the last row, is not.

    The return alone does not tell: of logits that are nan argmax takes the first, and a simulator goes on with such actions.
    """
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [rows[-1][name] for name in PLAYERS if name in rows[-1]] if rows else []
    returned = final_return is None or math.isfinite(final_return)
    return not returned or not all(cell and math.isfinite(float(cell)) for cell in losses)


def blob(commit: str | None, script: str) -> str | None:
    """Git's name for the content of a script at a commit: equal names, equal code. None if git does not know it or is not there."""
    try:
        done = subprocess.run(["git", "rev-parse", f"{commit}:{script}"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def mixtures(runs: list[dict], restated: tuple[str, ...] = ()) -> list[str]:
    """What keeps the runs from one table, each as a phrase; none if nothing does. Commands are compared without the arguments
    that are `restated` (Suite)."""
    problems = []
    commits = sorted({commit or "none" for run in runs for commit in run["commits"]})
    if len(commits) > 1:
        scripts = {(run["script"], run["script_blob"]) for run in runs}
        same = len(scripts) == len({script for script, _ in scripts}) and None not in {name for _, name in scripts}
        words = " (the scripts themselves are the same in all of them)" if same else ""
        problems.append(f"the commits {', '.join(commit[:10] for commit in commits)}{words}")
    dirty = [run["job"] for run in runs if run["dirty"]]
    if dirty:
        problems.append(f"runs of uncommitted code ({', '.join(dirty)})")
    for run in runs:
        if without(restated, run["command"].split()) != without(restated, ["python", *run["suite_command"]]):
            problems.append(f"a run with other arguments than the suite's now ({run['job']}: {run['command']})")
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for run in runs:
        key = json.dumps(run["arguments"], sort_keys=True)
        groups.setdefault((run["method"], run["environment"]), {}).setdefault(key, []).append(run["job"])
    for (method, environment), settings in groups.items():
        if len(settings) > 1:
            first, second = (json.loads(key) for key in list(settings)[:2])
            differing = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
            jobs = " and ".join(names[0] for names in settings.values())
            problems.append(f"runs of {method} on {environment} with different {', '.join(differing)} ({jobs})")
    return problems


def curve(run: Path, grid: int, diagnostics: tuple[str, ...]) -> tuple[list[str], list[list]]:
    """Header and rows of a run on the grid of steps; a diagnostic that its script does not log is left out.

    A run that ended early, since it diverged, has rows up to all the steps that it should have made.
    """
    with open(run / "episodes.csv") as file:
        episodes = [(int(row["global_step"]), float(row["episodic_return"])) for row in csv.DictReader(file)]
    with open(run / "metrics.csv") as file:
        metrics = list(csv.DictReader(file))
    steps, times = ([float(row[name]) for row in metrics] for name in ("global_step", "wall_time_s"))
    kept = [name for name in diagnostics if metrics and name in metrics[0]]
    planned = read_json(run / "args.json")["args"]["total_timesteps"]
    rows, end = [], planned if run_status(run) == "diverged" else steps[-1]
    for low in range(0, math.ceil(end / grid) * grid, grid):
        returns = [value for step, value in episodes if low < step <= low + grid]
        row = [low + grid, round(float(np.interp(low + grid, [0.0, *steps], [0.0, *times])), 2)]
        row += [round(float(np.mean(returns)), 3) if returns else "", len(returns)]
        inside = [line for line, step in zip(metrics, steps) if low < step <= low + grid]
        for name in kept:
            values = [float(line[name]) for line in inside if line[name]]
            row.append(f"{np.mean(values):.5g}" if values else "")
        rows.append(row)
    return ["global_step", "wall_time_s", "episodic_return", "episodes", *kept], rows


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    """Write a csv file as a whole."""

    def write(new: Path) -> None:
        with open(new, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])

    write_atomically(path, write)
