"""Run the jobs of a suite on a Slurm cluster, through submitit: one array job, resumed wherever it was stopped.

    submit    one array job of everything that has not finished and is not in Slurm's queue already
    SlurmJob  what a node runs: an attempt at one or several jobs (benchmark/launch.py), and what to do with
              Slurm's signals
    wait      a line for each change, until all have ended; what failed is submitted once more

What is finished, interrupted or failed is read from the jobs' folders, as on one machine. Slurm is asked only
which jobs are still in its queue: nothing here needs its accounting database. docs/cluster.md shows the use.
"""

import contextlib
import io
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated

import pydantic
import submitit
from pydantic import Field, NonNegativeInt, PositiveInt
from submitit.core.utils import DelayedSubmission, FailedJobError

from benchmark.launch import (
    ATTEMPTS,
    Attempt,
    Elsewhere,
    JobFile,
    finished_run,
    job_status,
    prepare,
    split_cores,
)
from benchmark.machine import read_as, write_atomically
from benchmark.suites import ROOT, BadSuite, Suite, first_sentence, nearest

# What Slurm sends before it ends a job: SIGTERM (requeue, scancel, pre-emption), and SIGUSR2, submitit's choice,
# ahead of the time limit.
SIGNALS = {signal.SIGTERM, signal.SIGUSR2}
# How long a job waits until another process lets go of its folder; NFS keeps the lock of a dead node for 90 s.
LOCK_PATIENCE_S = 180
SETTLE_S = (
    30  # a job that left the queue unfinished may turn out finished after all: NFS shows new files late
)
POLL_S = 5
# Parameters of sbatch that have an option of their own here, or that the launcher or submitit needs as they are.
OPTIONS = {"partition": "partition", "time": "time", "cpus_per_task": "cpus", "mem": "memory"}
OPTIONS |= {"gpus_per_node": "gpus"}
SET = "array chdir error job_name nodes ntasks ntasks_per_node open_mode output requeue".split()
TAKEN = {name: f"use --slurm-{option}" for name, option in OPTIONS.items()}
TAKEN |= dict.fromkeys(SET, "the launcher sets it itself; leave it out")
# Why a job usually waits; any other reason is worth telling.
ORDINARY_REASONS = {"None", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit", "Dependency"}


# ---- Options ---------------------------------------------------------------------------------------------
class SlurmOptions(pydantic.BaseModel, extra="forbid"):
    """What each Slurm job asks for. Raises BadSuite for a value that makes no sense."""

    slurm_partition: str | None = None
    """partition of the array job; default: the cluster's"""
    slurm_time: PositiveInt = 240
    """minutes after which Slurm stops a job, which then goes on in a new one"""
    slurm_cpus: PositiveInt = 1
    """cores of a Slurm job"""
    slurm_gpus: NonNegativeInt = 0
    """GPUs of a Slurm job"""
    slurm_memory: Annotated[str, Field(pattern="^[1-9][0-9]*[KMGT]B?$")] = "4GB"
    """memory of a Slurm job, such as 4GB or 512MB"""
    slurm_parallelism: PositiveInt = 64
    """Slurm jobs at the same time, at most"""
    slurm_pack: PositiveInt = 1
    """runs side by side in one Slurm job, which share what it has"""
    slurm_timeouts: NonNegativeInt = 20
    """how often a job may reach its time limit and go on; pre-emptions are not counted"""
    slurm_extra: dict[str, str] = {}
    """further options of sbatch, as KEY VALUE pairs: account my_account qos high"""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def one_sentence(cls, values, check):
        """Raise BadSuite for the first option that is out of its range, or is not theirs."""
        try:
            options = check(values)
        except pydantic.ValidationError as error:
            raise BadSuite(f"--{first_sentence(error).replace('_', '-', 2)}") from None
        for key in options.slurm_extra:
            if key.replace("-", "_") in TAKEN:
                raise BadSuite(f"--slurm-extra {key}: {TAKEN[key.replace('-', '_')]}")
        return options

    def for_suite(self, suite: Suite) -> "SlurmOptions":
        """The options with no more runs at a time than the suite allows."""
        most = suite.workers or self.slurm_parallelism * self.slurm_pack
        pack = min(self.slurm_pack, most)
        parallelism = min(self.slurm_parallelism, most // pack)
        return self.model_copy(update={"slurm_pack": pack, "slurm_parallelism": parallelism})


class Queued(pydantic.BaseModel):
    """slurm.json in a job's folder: the number of its Slurm job, and the folder of the logs."""

    job: str
    logs: str


def check_cluster(options: SlurmOptions) -> None:
    """Raise BadSuite where there is no Slurm, or no such partition."""
    if any(shutil.which(program) is None for program in ("sbatch", "srun", "squeue", "sinfo")):
        raise BadSuite(
            "--engine slurm: there is no sbatch here; run it where Slurm is, or use --engine local"
        )
    asked = subprocess.run(["sinfo", "--all", "--noheader", "--format=%R"], capture_output=True, text=True)
    if asked.returncode != 0:
        raise BadSuite(f"--engine slurm: Slurm does not answer: {' '.join(asked.stderr.split())}")
    partitions = sorted(set(asked.stdout.split()))
    if options.slurm_partition is not None and options.slurm_partition not in partitions:
        known = nearest(options.slurm_partition, partitions)
        raise BadSuite(f"--slurm-partition: there is no partition {options.slurm_partition!r}{known}")


# ---- What a node runs ------------------------------------------------------------------------------------
@contextlib.contextmanager
def signals_held():
    """Within the block Slurm's signals wait; a process that is started in it is never reached by them.

    Slurm signals every process of a job, not only ours: SIGUSR2 would kill a training script, and a SIGTERM
    beside the one that we hand on would be its second, at which it stops without a checkpoint. A child inherits
    what is blocked.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait_to_be_killed() -> None:
    """Leave it to Slurm what becomes of this job: it requeues or removes it, after SIGKILL, or sends SIGUSR2."""
    while True:
        signal.pause()


class SlurmJob:
    """The jobs of some folders, as submitit pickles them and runs them side by side on a node.

    SIGUSR2 (the time limit comes near, or a pre-emption where Slurm is set up to send it): submitit calls
    `checkpoint`, requeues the job under its old number and runs what `checkpoint` returned. SIGTERM (scontrol
    requeue, pre-emption, scancel): the scripts checkpoint, and the job waits for what Slurm does with it.
    SIGKILL: the next attempt goes on from the last checkpoint that was written.
    """

    def __init__(self, folders: list[Path], track: bool = False):
        self.folders, self.track, self.running = folders, track, []
        self.told_to_stop, self.terminated = False, False

    def __call__(self) -> None:
        """Run, resume or skip the jobs. Raises RuntimeError if some failed."""
        signal.signal(signal.SIGTERM, self.terminate)  # submitit's own handler of it does nothing
        limit, several = time.monotonic() + LOCK_PATIENCE_S, len(self.folders) > 1
        waiting = dict(zip(self.folders, split_cores(len(self.folders)) if several else [None]))
        while waiting and not self.told_to_stop and time.monotonic() < limit:
            for folder, cores in list(waiting.items()):
                with signals_held(), contextlib.suppress(Elsewhere):
                    if not self.told_to_stop:
                        self.running.append(Attempt(folder, cores, track=self.track))
                        del waiting[folder]
            if waiting:
                time.sleep(1)
        codes = self.follow()
        left = [folder for folder in self.folders if finished_run(folder) is None]
        if left and self.terminated:
            # Were it to end of itself now, a pre-emption that gives it a time of grace would not requeue it.
            wait_to_be_killed()
        failed = [f"{folder.name}: exit status {codes[folder]}" for folder in left if codes.get(folder)]
        if failed:
            raise RuntimeError(f"{'; '.join(failed)}; see log.txt in {self.folders[0].parent}")

    def terminate(self, number: int, frame) -> None:
        """Slurm's SIGTERM."""
        self.terminated = True
        self.stop()

    def stop(self) -> None:
        """Ask the scripts to checkpoint and end; by SIGINT, since they do not see SIGTERM (`signals_held`)."""
        self.told_to_stop = True
        for attempt in self.running:
            attempt.stop(signal.SIGINT)

    def follow(self) -> dict[Path, int]:
        """Wait until the scripts have ended and that is on record; their exit statuses."""
        codes = {}
        while len(codes) < len(self.running):
            for attempt in self.running:
                # Held, so that `checkpoint`, called from a handler, never finds this half done.
                with signals_held():
                    code = attempt.poll()
                if code is not None:
                    codes[attempt.folder] = code
            time.sleep(0.1)
        return codes

    def checkpoint(self) -> DelayedSubmission:
        """Stop the scripts at a checkpoint; what to run in this job's place, for submitit."""
        before = self.terminated
        self.stop()
        self.follow()
        if self.terminated and not before:
            # Slurm has been told meanwhile what to do with this job; to requeue it now would undo a scancel.
            wait_to_be_killed()
        return DelayedSubmission(SlurmJob(self.folders, self.track))


# ---- Submitting ------------------------------------------------------------------------------------------
def queue() -> dict[str, str] | None:
    """State of each of my jobs in Slurm's queue, by number (array tasks as 12_3); None if Slurm does not answer."""
    words = ["squeue", "--me", "--array", "--noheader", "--format=%i|%T|%r"]
    asked = subprocess.run(words, capture_output=True, text=True)
    if asked.returncode != 0:
        return None
    states = {}
    for line in asked.stdout.splitlines():
        number, state, reason = line.strip().split("|", 2)
        told = f" ({reason})" if state == "PENDING" and reason not in ORDINARY_REASONS else ""
        states[number] = state.lower() + told
    return states


def submit(folders: list[Path], options: SlurmOptions, track: bool = False) -> dict[Path, submitit.Job]:
    """Submit the jobs of these folders (all of one suite) as one array; the Slurm job of each not finished.

    A job that is still in the queue from an earlier call is not submitted again. Raises BadSuite, with nothing
    submitted, where Slurm is missing or refuses.
    """
    check_cluster(options)
    queued, jobs, new = queue(), {}, []
    if queued is None:
        raise BadSuite("--engine slurm: squeue does not answer; try again")
    for folder in (folder.resolve() for folder in folders):
        known = read_as(Queued, folder / "slurm.json")
        if finished_run(folder) is not None:
            continue
        if known is not None and known.job in queued:
            jobs[folder] = submitit.SlurmJob(folder=known.logs, job_id=known.job)
        else:
            new.append(folder)
    return jobs | (submit_array(new, options, track) if new else {})


def submit_array(folders: list[Path], options: SlurmOptions, track: bool) -> dict[Path, submitit.Job]:
    """One array job of these folders, `pack` of them in each task, and its numbers in their slurm.json.

    Raises BadSuite if sbatch refuses it.
    """
    suite = folders[0].parent
    logs = suite / "slurm" / f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    executor = submitit.AutoExecutor(
        folder=logs, cluster="slurm", slurm_max_num_timeout=options.slurm_timeouts
    )
    executor.update_parameters(
        name=suite.name,
        nodes=1,
        tasks_per_node=1,
        timeout_min=options.slurm_time,
        cpus_per_task=options.slurm_cpus,
        gpus_per_node=options.slurm_gpus or None,
        slurm_mem=options.slurm_memory,
        slurm_partition=options.slurm_partition,
        slurm_array_parallelism=options.slurm_parallelism,
        # Since Slurm 22.05 srun no longer takes this from sbatch, and would run the job on one CPU.
        slurm_srun_args=[f"--cpus-per-task={options.slurm_cpus}"],
        # chdir: the nodes import this package from there.
        slurm_additional_parameters={"chdir": str(ROOT), "requeue": True} | options.slurm_extra,
    )
    jobs = {}
    try:
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # submitit prints what it raises
            for first in range(0, len(folders), options.slurm_pack):
                group = folders[first : first + options.slurm_pack]
                jobs |= dict.fromkeys(group, executor.submit(SlurmJob(group, track)))
    except FailedJobError as error:
        shutil.rmtree(logs)
        raise BadSuite(f"--engine slurm: sbatch refuses the jobs: {' '.join(str(error).split())}") from error
    for folder, job in jobs.items():
        text = Queued(job=job.job_id, logs=str(logs)).model_dump_json() + "\n"
        write_atomically(folder / "slurm.json", lambda new, text=text: new.write_text(text))
    return jobs


# ---- Waiting ---------------------------------------------------------------------------------------------
def wait(
    jobs: dict, options: SlurmOptions, say: Callable[[str], object], track: bool = False
) -> dict[Path, str]:
    """Wait until all jobs have ended, telling each change of state; a failed one is submitted once more.

    Returns what has not finished, and why in a few words.
    """
    jobs, told, failures, left_at, unfinished = dict(jobs), {}, {}, {}, {}

    def tell(folder: Path, state: str, note: str = "") -> None:
        if told.get(folder) != state:
            say(f"{state:<10} {folder.name} (Slurm job {jobs[folder].job_id}){note}")
            told[folder] = state

    while jobs:
        queued, again = queue(), []
        for folder, job in list(jobs.items() if queued is not None else ()):
            status = job_status(folder)
            if job.job_id in queued:
                left_at.pop(folder, None)
                tell(folder, queued[job.job_id])
            elif status == "finished":
                tell(folder, "done")
                del jobs[folder]
            elif status == "running":  # by another launcher
                left_at.pop(folder, None)
                tell(folder, "elsewhere")
            elif time.monotonic() - left_at.setdefault(folder, time.monotonic()) >= SETTLE_S:
                del left_at[folder]
                why = reason(folder, job, status)
                failures[folder] = failures.get(folder, 0) + (status != "interrupted")
                if status != "interrupted" and failures[folder] < ATTEMPTS:
                    tell(folder, "FAILED", f": {why}; once more")
                    again.append(folder)
                else:
                    tell(folder, "STOPPED" if status == "interrupted" else "FAILED", f": {why}")
                    unfinished[folder] = why
                    del jobs[folder]
        if again:
            jobs |= submit_array(again, options, track)
        if jobs:
            time.sleep(POLL_S)
    return unfinished


def reason(folder: Path, job: submitit.Job, status: str) -> str:
    """Why a job that is in the queue no more has not finished."""
    if status == "failed":
        code = read_as(JobFile, folder / "job.json").attempts[-1]["exit_code"]
        return f"exit status {code}, see {folder / 'log.txt'}"
    if status == "interrupted":
        return (
            f"ended by Slurm or killed, see {job.paths.stderr}; the same command goes on from the checkpoint"
        )
    return f"never started, see {job.paths.stderr}"


def run_slurm(suite: Suite, run_dir: Path, options: SlurmOptions, track: bool = False, say=print) -> int:
    """Submit the suite and wait for it; exit status 0, or 1 if some jobs did not finish, or 130 after Ctrl-C."""
    check_cluster(options)
    options = options.for_suite(suite)
    folders = prepare(suite, run_dir)
    jobs = submit(folders, options, track)
    done = len(folders) - len(jobs)
    say(f"{suite.name}: {len(folders)} jobs, {done} finished, {len(jobs)} in Slurm, in {run_dir}")
    try:
        unfinished = wait(jobs, options, say, track)
    except KeyboardInterrupt:
        numbers = sorted({job.job_id.split("_")[0] for job in jobs.values()})
        say(
            f"the jobs go on in Slurm; the same command watches them, `scancel {' '.join(numbers)}` ends them"
        )
        return 130
    for folder, why in unfinished.items():
        say(f"not finished: {folder.name}: {why}")
    return 1 if unfinished else 0
