"""The committed results of a suite, `benchmark/results/SUITE/`, read and written as tables.

    curves.csv   one row a run and point of the suite's grid of steps, sorted by environment, method, seed and
                 global_step; wall_time_s, episodic_return (mean of the episodes that ended since the point
                 before), episodes (how many) and the suite's diagnostics; empty cells where there is nothing
    runs.json    what was collected (RunsFile), one entry a run (Entry), each on a line of its own

Both files are replaced as a whole, curves.csv first: rows of runs that runs.json does not name are not read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from benchmark.machine import read_as, write_atomically
from benchmark.reference import load_reference
from benchmark.suites import ROOT, BadSuite, Job, Suite, same_run

RUN = ["environment", "method", "seed"]  # the columns that name a run
COLUMNS = [*RUN, "global_step", "wall_time_s", "episodic_return", "episodes"]  # and before the diagnostics


class Entry(BaseModel):
    """Where a run came from, and what came out."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    job: str
    method: str
    environment: str
    seed: int
    script: str
    command: str
    arguments: dict[str, Any]
    """what decides the result, by the script's own names; without who and where the run is"""
    commit: str | None
    """of the last attempt; None without git"""
    commits: list[str | None]
    script_blob: str | None
    """git's name for the content of the script at that commit: equal names, equal code"""
    dirty: bool | None
    versions: dict[str, str | None]
    cpu: str | None
    gpu: str | None
    cores: list[int] | None
    attempts: int
    load: float | None = None
    """the highest load average at the start or the end of an attempt"""
    final_return: float | None
    """mean of the episodes that ended in the last tenth of the steps; None if none did"""
    diverged: bool = False
    """its numbers were not finite at the end"""
    wall_time_s: float | None
    """None of a run that stopped because it diverged: it made fewer steps"""
    steps: int


class RunsFile(BaseModel):
    """The content of runs.json."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    suite: str
    file: str = Field(default_factory=lambda known: f"benchmark/suites/{known['suite']}.toml")
    """the suite file that these are the results of"""
    mixed: list[str] = []
    missing: list[str] = []
    failed: list[str] = []
    runs: list[Entry] = []


@dataclass(frozen=True)
class Results:
    """What is committed of a suite's runs, as far as the suite has their jobs."""

    runs: pd.DataFrame
    """one row a run, in the suite's order: the columns of Entry and `dead`, whether it had stopped learning
    by the suite's own measure (it counts as it is); wall_time_s is nan where the suite says untimed,
    final_return the random policy's of a run that diverged"""
    curves: pd.DataFrame
    """the columns of curves.csv, of these runs; a point without the end of an episode has the return of the
    point before it, those after the last such end of a run that diverged the random policy's"""
    missing: list[str] = field(default_factory=list)
    """jobs of the suite without a run, in the suite's order"""
    failed: list[str] = field(default_factory=list)
    """those of the missing jobs that ended with an error"""
    mixed: list[str] = field(default_factory=list)
    """what keeps the runs from one table, though they were collected together; each a phrase"""
    ignored: list[str] = field(default_factory=list)
    """runs whose job the suite does not have any more"""

    def of(self, method: str, environment: str) -> pd.DataFrame:
        """The runs of a method on an environment, by seed."""
        return chosen(self.runs, method, environment)

    def curves_of(self, method: str, environment: str, column: str = "episodic_return") -> pd.DataFrame:
        """A column of their curves as a table, one row a grid point (global_step), one column a seed."""
        rows = chosen(self.curves, method, environment)
        return rows.pivot(index="global_step", columns="seed", values=column)

    def without(self, jobs: Iterable[str]) -> "Results":
        """The same with the runs of these jobs left out."""
        runs = self.runs[~self.runs["job"].isin(list(jobs))]
        return replace(self, runs=runs, curves=self.curves.merge(runs[RUN], on=RUN))


def chosen(table: pd.DataFrame, method: str, environment: str) -> pd.DataFrame:
    """The rows of a method on an environment."""
    return table[(table["method"] == method) & (table["environment"] == environment)]


# ---- Reading -----------------------------------------------------------------------------------------------
def read_runs(folder: Path) -> RunsFile | None:
    """The runs.json of a suite's folder; None if there is none. Raises BadSuite if it is damaged."""
    return read_as(RunsFile, folder / "runs.json")


def suite_file(suite: Suite) -> str:
    """The suite's file, in the repository if it is there: whose results a folder holds."""
    path = suite.path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def own_runs(suite: Suite, folder: Path) -> RunsFile | None:
    """The runs.json of a folder that is to be written. Raises BadSuite if it is another suite's."""
    found = read_runs(folder)
    if found is not None and found.file != suite_file(suite):
        other = f"holds the results of {found.file}, not of {suite_file(suite)}"
        raise BadSuite(f"{folder} {other}; name another --results")
    return found


def read_curves(folder: Path, cells: type = float) -> pd.DataFrame:
    """The curves.csv of a suite's folder: its cells as float or, to be written again as they are, as str.

    Raises BadSuite if it is not there or damaged.
    """
    path, names = folder / "curves.csv", {"environment": str, "method": str, "seed": int, "global_step": int}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        absent = [name for name in COLUMNS if name not in table]
        if absent:
            raise ValueError(f"the column {absent[0]} is missing")
        table = table.astype(names)
        if table.duplicated([*RUN, "global_step"]).any():
            raise ValueError("a run has a point twice")
        others = [] if cells is str else [name for name in table if name not in names]
        return table.replace(dict.fromkeys(others, ""), np.nan).astype(dict.fromkeys(others, float))
    except (OSError, ValueError) as error:
        raise BadSuite(f"{path} cannot be read: {error}; collect the suite again") from None


def load_results(suite: Suite, results_folder: Path) -> Results:
    """Read `results_folder/SUITE/`; without that folder every job is missing. Raises BadSuite for damage."""
    read, runs, curves, missing, levels = {}, [], [], [], load_reference()
    for job in suite.shown():
        there = job_there(suite, job)
        if there.suite not in read:
            read[there.suite] = read_suite(results_folder / there.suite, there.suite)
        content, points = read[there.suite]
        run = next((run for run in content.runs if run.job == there.name), None)
        other = run is not None and there is not job  # then it must be this job's run by its command too
        if run is None or (other and not same_run(job.command, run.command.split()[1:], suite.restated)):
            missing.append(job.name)
            continue
        try:
            curve = points.get_group((run.environment, run.method, run.seed))
        except KeyError:
            folder = results_folder / there.suite
            raise BadSuite(f"{folder / 'curves.csv'} has no rows of {run.job}, a run of runs.json") from None
        row = run.model_dump() | {"job": job.name, "method": job.method, "dead": is_dead(suite, curve)}
        filled = curve["episodic_return"].ffill()
        if run.diverged:
            random = row["final_return"] = levels.get(job.environment, {}).get("random", np.nan)
            filled[curve["episodic_return"].bfill().isna()] = random
        if suite.methods[job.method].untimed:
            row["wall_time_s"] = None
        runs.append(row)
        curves.append(curve.assign(method=job.method, episodic_return=filled))
    content, _ = read.get(suite.name) or read_suite(results_folder / suite.name, suite.name)
    numbers = {"seed": int, "steps": int, "diverged": bool, "dead": bool}
    numbers |= dict.fromkeys(("load", "final_return", "wall_time_s"), float)
    return Results(
        pd.DataFrame(runs, columns=[*Entry.model_fields, "dead"]).astype(numbers),
        pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(columns=COLUMNS),
        missing,
        [name for name in missing if name in content.failed],
        content.mixed,
        sorted({run.job for run in content.runs} - {job.name for job in suite.shown()}),
    )


def read_suite(folder: Path, name: str) -> tuple[RunsFile, Any]:
    """What is in a suite's folder: runs.json, and curves.csv grouped by run."""
    content = read_runs(folder) or RunsFile(suite=name)
    return content, (read_curves(folder) if content.runs else pd.DataFrame(columns=COLUMNS)).groupby(RUN)


def job_there(suite: Suite, job: Job) -> Job:
    """The job of the suite that launched it: another one's, if the method's runs are taken from there."""
    taken = suite.methods[job.method].runs_of
    return job if taken is None else replace(job, suite=taken[0], method=taken[1])


def is_dead(suite: Suite, curve: pd.DataFrame) -> bool:
    """Whether a run had stopped learning, by the suite's measure, if it has one and the run values of it."""
    if suite.dead is None or suite.dead.column not in curve:
        return False
    values = curve[suite.dead.column].tail(max(1, len(curve) // 10))
    return bool(values.replace([np.inf, -np.inf], np.nan).mean() < suite.dead.below)


# ---- Writing -----------------------------------------------------------------------------------------------
def write_results(folder: Path, content: RunsFile, curves: pd.DataFrame) -> None:
    """Replace curves.csv and runs.json in a suite's folder; `curves` as of `read_curves(..., str)`."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = curves.sort_values([*RUN, "global_step"], kind="stable")
    write_atomically(folder / "curves.csv", lambda new: curves.to_csv(new, index=False, lineterminator="\n"))
    head = content.model_dump_json(exclude={"runs"}).removesuffix("}")
    lines = ",\n".join(run.model_dump_json() for run in content.runs)
    write_atomically(folder / "runs.json", lambda new: new.write_text(f'{head},"runs":[\n{lines}\n]}}\n'))
