"""Run the jobs of a suite on a Slurm cluster, through submitit: one array job, resumed wherever it was stopped.

    submit    one array job of everything that has not finished and is not in Slurm's queue already
    SlurmJob  what a node runs: one attempt at a job (benchmark/launch.py), and what to do with Slurm's signals
    wait      a line for each change, until all have ended; what failed is submitted once more

What is finished, interrupted or failed is read from the jobs' folders, as on one machine. Slurm is asked only which jobs
are still in its queue, so nothing here needs its accounting database. docs/cluster.md shows the use, step by step.
"""

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError

from benchmark.launch import ATTEMPTS, ELSEWHERE, Attempt, Elsewhere, finished_run, job_status, prepare
from benchmark.machine import write_atomically
from benchmark.suites import ROOT, BadSuite, Suite, nearest, read_json

# What Slurm sends before it ends a job: SIGTERM (requeue, scancel, pre-emption), and SIGUSR2, submitit's choice, ahead of
# the time limit.
SIGNALS = {signal.SIGTERM, signal.SIGUSR2}
# How long a job waits for another process to let go of its folder: after a crash, NFS keeps a dead node's lock for 90 s.
LOCK_PATIENCE_S = 180
# How long a job that left the queue unfinished may turn out finished after all: NFS shows new files late.
SETTLE_S = 30
POLL_S = 5
# Parameters of sbatch that have an option of their own here, or that the launcher or submitit needs as they are.
OWN_PARAMETERS = {
    "partition": "--slurm-partition", "time": "--slurm-time", "cpus-per-task": "--slurm-cpus", "mem": "--slurm-memory",
    "gpus-per-node": "--slurm-gpus", "array": None, "chdir": None, "error": None, "job-name": None, "nodes": None,
    "ntasks": None, "ntasks-per-node": None, "open-mode": None, "output": None, "requeue": None,
}  # fmt: skip
# Why a job usually waits; any other reason is worth telling.
ORDINARY_REASONS = {"None", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit", "Dependency"}


# ---- Options ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SlurmOptions:
    """What each job asks of Slurm. Raises BadSuite for a value that makes no sense."""

    partition: str | None = None
    """partition of the jobs; None: the cluster's default"""
    time: int = 240
    """time limit of a job in minutes; a job that reaches it is requeued and goes on from its checkpoint"""
    cpus: int = 1
    """CPUs of a job"""
    gpus: int = 0
    """GPUs of a job"""
    memory: str | None = "4GB"
    """memory of a job, such as 4GB or 512MB; None: the cluster's default"""
    parallelism: int = 64
    """jobs that run at the same time, at most"""
    max_timeouts: int = 20
    """how often a job may reach its time limit; pre-emptions are not counted"""
    extra: dict[str, str] = field(default_factory=dict)
    """further parameters of sbatch, such as account, qos, constraint, signal"""

    def __post_init__(self):
        for name, option, least in (
            ("time", "--slurm-time", 1),
            ("cpus", "--slurm-cpus", 1),
            ("gpus", "--slurm-gpus", 0),
            ("parallelism", "--slurm-parallelism", 1),
            ("max_timeouts", "max_timeouts", 0),
        ):
            if getattr(self, name) < least:
                raise BadSuite(f"{option} is {getattr(self, name)}, it must be at least {least}")
        if self.memory is not None and not re.fullmatch(r"[1-9][0-9]*[KMGT]B?", self.memory):
            raise BadSuite(f"--slurm-memory is {self.memory!r}, it must be a whole number from 1 with its unit, such as 4GB")
        for key in self.extra:
            if (name := key.replace("_", "-")) in OWN_PARAMETERS:
                instead = OWN_PARAMETERS[name]
                advice = f"use {instead}" if instead else "the launcher sets it itself; leave it out"
                raise BadSuite(f"--slurm-extra {key}: {advice}")


def check_cluster(options: SlurmOptions) -> None:
    """Raise BadSuite where there is no Slurm, or no such partition."""
    if any(shutil.which(program) is None for program in ("sbatch", "srun", "squeue", "sinfo")):
        raise BadSuite("--engine slurm: there is no sbatch on this machine; run it where Slurm is, or use --engine local")
    asked = subprocess.run(["sinfo", "--all", "--noheader", "--format=%R"], capture_output=True, text=True)
    if asked.returncode != 0:
        raise BadSuite(f"--engine slurm: Slurm does not answer: {' '.join(asked.stderr.split())}")
    partitions = sorted(set(asked.stdout.split()))
    if options.partition is not None and options.partition not in partitions:
        known = nearest(options.partition, partitions)
        raise BadSuite(f"--slurm-partition: there is no partition {options.partition!r}{known}")


# ---- What a node runs ------------------------------------------------------------------------------------------
@contextlib.contextmanager
def signals_held():
    """Within the block Slurm's signals wait; a process that is started in it is never reached by them.

    Slurm signals every process of a job, not only ours: SIGUSR2 would kill a training script, and a SIGTERM beside the one
    that we hand on would be its second, at which it stops without a checkpoint. A child inherits what is blocked.
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
    """The job of a folder, as submitit pickles it and runs it on a node.

    SIGUSR2 (the time limit comes near, or a pre-emption where Slurm is set up to send it): submitit calls `checkpoint`,
    requeues the job under its old number and runs what `checkpoint` returned. SIGTERM (scontrol requeue, pre-emption,
    scancel): the script checkpoints, and the job waits for what Slurm does with it. SIGKILL: the next attempt goes on from
    the last checkpoint that was written.
    """

    def __init__(self, folder: Path):
        self.folder, self.running, self.told_to_stop, self.terminated = folder, None, False, False

    def __call__(self) -> int:
        """Run, resume or skip the job: 0, or ELSEWHERE if another process kept it. Raises RuntimeError if it failed."""
        # submitit's own handler of SIGTERM does nothing.
        signal.signal(signal.SIGTERM, self.terminate)
        limit = time.monotonic() + LOCK_PATIENCE_S
        while self.running is None:
            try:
                with signals_held():
                    if self.told_to_stop:
                        break
                    self.running = Attempt(self.folder)
            except Elsewhere:
                if time.monotonic() > limit:
                    return ELSEWHERE
                time.sleep(1)
        code = self.follow()
        if finished_run(self.folder) is not None:  # a run that diverged has the exit status 1
            return 0
        if self.terminated:
            # Were it to end of itself now, a pre-emption that gives it a time of grace would not requeue it.
            wait_to_be_killed()
        if code:
            raise RuntimeError(f"{self.folder.name}: exit status {code}; see {self.folder / 'log.txt'}")
        return 0

    def terminate(self, number: int, frame) -> None:
        """Slurm's SIGTERM."""
        self.terminated = True
        self.stop()

    def stop(self) -> None:
        """Ask the script, once, to checkpoint and end; by SIGINT, since it does not see SIGTERM (`signals_held`)."""
        if not self.told_to_stop and self.running is not None and self.running.process is not None:
            self.running.process.send_signal(signal.SIGINT)
        self.told_to_stop = True

    def follow(self) -> int | None:
        """Wait until the script has ended and that is on record; its exit status, None if none was started."""
        while self.running is not None:
            # Held, so that `checkpoint`, called from a handler, never finds this half done.
            with signals_held():
                code = self.running.poll()
            if code is not None:
                return code
            time.sleep(0.1)

    def checkpoint(self) -> DelayedSubmission:
        """Stop the script at a checkpoint; what to run in this job's place, for submitit."""
        before = self.terminated
        self.stop()
        self.follow()
        if self.terminated and not before:
            # Slurm has been told meanwhile what to do with this job; to requeue it now would undo a scancel.
            wait_to_be_killed()
        return DelayedSubmission(SlurmJob(self.folder))


# ---- Submitting ------------------------------------------------------------------------------------------------
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


def submit(folders: list[Path], options: SlurmOptions) -> dict[Path, submitit.Job]:
    """Submit the jobs of these folders (all of one suite) as one array; the Slurm job of each that has not finished.

    A job that is still in the queue from an earlier call is not submitted again. Raises BadSuite, with nothing
    submitted, where Slurm is missing or refuses.
    """
    check_cluster(options)
    queued, jobs, new = queue(), {}, []
    if queued is None:
        raise BadSuite("--engine slurm: squeue does not answer; try again")
    for folder in (folder.resolve() for folder in folders):
        known = read_json(folder / "slurm.json")
        if finished_run(folder) is not None:
            continue
        if known is not None and known["job"] in queued:
            jobs[folder] = submitit.SlurmJob(folder=known["logs"], job_id=known["job"])
        else:
            new.append(folder)
    return jobs | (submit_array(new, options) if new else {})


def submit_array(folders: list[Path], options: SlurmOptions) -> dict[Path, submitit.Job]:
    """One array job of these folders, and its numbers in their slurm.json. Raises BadSuite if sbatch refuses it."""
    suite = folders[0].parent
    logs = suite / "slurm" / f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    executor = submitit.AutoExecutor(folder=logs, cluster="slurm", slurm_max_num_timeout=options.max_timeouts)
    executor.update_parameters(
        name=suite.name,
        nodes=1,
        tasks_per_node=1,
        timeout_min=options.time,
        cpus_per_task=options.cpus,
        gpus_per_node=options.gpus or None,
        slurm_mem=options.memory,
        slurm_partition=options.partition,
        slurm_array_parallelism=options.parallelism,
        # Since Slurm 22.05 srun no longer takes this from sbatch, and would run the job on one CPU.
        slurm_srun_args=[f"--cpus-per-task={options.cpus}"],
        # chdir: the nodes import this package from there.
        slurm_additional_parameters={"chdir": str(ROOT), "requeue": True} | options.extra,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            with executor.batch():
                jobs = {folder: executor.submit(SlurmJob(folder)) for folder in folders}
    except FailedJobError as error:
        shutil.rmtree(logs)
        raise BadSuite(f"--engine slurm: sbatch refuses the jobs: {' '.join(str(error).split())}") from error
    for folder, job in jobs.items():
        content = json.dumps({"job": job.job_id, "logs": str(logs)}) + "\n"
        write_atomically(folder / "slurm.json", lambda new: new.write_text(content))
    return jobs


# ---- Waiting ---------------------------------------------------------------------------------------------------
def wait(
    jobs: dict[Path, submitit.Job], options: SlurmOptions, say: Callable[[str], object] = print
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
            jobs |= submit_array(again, options)
        if jobs:
            time.sleep(POLL_S)
    return unfinished


def reason(folder: Path, job: submitit.Job, status: str) -> str:
    """Why a job that is in the queue no more has not finished."""
    attempts = (read_json(folder / "job.json") or {}).get("attempts", [])
    if status == "failed":
        return f"exit status {attempts[-1]['exit_code']}, see {folder / 'log.txt'}"
    if status == "interrupted":
        return f"ended by Slurm or killed, see {job.paths.stderr}; the same command goes on from the checkpoint"
    return f"never started, see {job.paths.stderr}"


def run_slurm(suite: Suite, run_dir: Path, options: SlurmOptions, say: Callable[[str], object] = print) -> int:
    """Submit the suite and wait for it; exit status 0, or 1 if some jobs did not finish, or 130 after Ctrl-C."""
    check_cluster(options)
    options = replace(options, parallelism=min(options.parallelism, suite.workers or options.parallelism))
    folders = prepare(suite, run_dir)
    jobs = submit(folders, options)
    say(f"{suite.name}: {len(folders)} jobs, {len(folders) - len(jobs)} finished, {len(jobs)} in Slurm, in {run_dir}")
    try:
        unfinished = wait(jobs, options, say)
    except KeyboardInterrupt:
        numbers = sorted({job.job_id.split("_")[0] for job in jobs.values()})
        say(f"the jobs go on in Slurm; the same command watches them again, `scancel {' '.join(numbers)}` ends them")
        return 130
    for folder, why in unfinished.items():
        say(f"not finished: {folder.name}: {why}")
    return 1 if unfinished else 0
