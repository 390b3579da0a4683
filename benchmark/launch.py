"""Run the jobs of a suite on this machine: pinned to cores, resumable, each at most once at a time.

A job has a folder `RUN_DIR/SUITE/JOB/`:

    job.json     suite, method, environment, seed, command; and a list of its attempts (command line, commit, versions,
                 machine, start, end, load average at both, exit status)
    log.txt      what the script printed, attempt after attempt
    exit_code    exit status of the last attempt
    lock         held (flock) by the training process itself, so that it outlives a killed launcher
    {run}/       the script's own run folder (docs/run_folder.md)

Nothing else is remembered: what is finished, interrupted or failed is read from these folders, so a launcher may be
killed at any moment and started again, and several may share the work. A run that diverged (its numbers are not finite any
more) is finished: it would diverge again. The runs that a killed launcher left behind, and those of another one on the same
machine, count among the `workers` runs at a time.
"""

import contextlib
import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from benchmark.machine import provenance, write_atomically
from benchmark.suites import ROOT, BadSuite, Job, Suite, read_json

ELSEWHERE = 75  # exit status of an attempt at a job that another process is running (EX_TEMPFAIL of sysexits.h)
# A script that was asked to stop checkpoints; one that was asked while it still imported just ends.
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)
ATTEMPTS = 2  # of a job that fails, in one launch


# ---- A job's folder --------------------------------------------------------------------------------------------
def prepare(suite: Suite, run_dir: Path) -> list[Path]:
    """Create the folder of every job, with its job.json, and return them in the suite's order.

    Raises BadSuite if a folder belongs to a job of that name with another command, or cannot be written.
    """
    folders = []
    for job in suite.jobs():
        folder = run_dir / suite.name / job.name
        known = read_json(folder / "job.json")
        if known is not None and known["command"] != job.command:
            raise BadSuite(
                f"{suite.path.name}, methods.{job.method}: the job {job.name} in {folder.parent} was made with other "
                f"arguments ({' '.join(known['command'])}); choose another --run-dir or remove that folder"
            )
        if known is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_job(folder, describe(job) | {"attempts": []})
            except OSError as error:
                raise BadSuite(f"--run-dir {run_dir} cannot be written: {error}; name another folder") from error
        folders.append(folder)
    return folders


def describe(job: Job) -> dict:
    """What job.json says of a job."""
    who = {"job": job.name, "suite": job.suite, "method": job.method, "environment": job.environment, "seed": job.seed}
    return who | {"command": job.command}


def write_job(folder: Path, content: dict) -> None:
    """Replace job.json."""
    text = json.dumps(content, indent=1, default=str) + "\n"
    write_atomically(folder / "job.json", lambda new: new.write_text(text))


def run_folders(folder: Path) -> list[Path]:
    """The script's run folders in a job's folder, oldest first."""
    return sorted((path.parent for path in folder.glob("*/args.json")), key=lambda path: path.stat().st_mtime)


def finished_run(folder: Path) -> Path | None:
    """The run folder of a job that has come to its end: all its steps, or numbers that are not finite any more."""
    for run in run_folders(folder):
        if run_status(run) in ("finished", "diverged"):
            return run
    return None


def run_status(run: Path) -> str | None:
    """What the result.json of a run folder says; None without it."""
    return (read_json(run / "result.json") or {}).get("status")


def job_status(folder: Path) -> str:
    """finished, running, failed, interrupted or waiting."""
    if finished_run(folder) is not None:
        return "finished"
    if locked(folder):
        return "running"
    attempts = (read_json(folder / "job.json") or {}).get("attempts", [])
    if not attempts:
        return "waiting"
    code = attempts[-1].get("exit_code")
    return "interrupted" if code is None or code in STOPPED else "failed"


def locked(folder: Path) -> bool:
    """Whether a training process holds a job's folder."""
    if not (folder / "lock").exists():
        return False
    with open(folder / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def cores_in_use(folder: Path) -> set[int] | None:
    """The cores of the run that holds a job's folder; None if there is none, or on another machine."""
    attempts = (read_json(folder / "job.json") or {}).get("attempts", []) if locked(folder) else []
    if not attempts or attempts[-1]["host"] != os.uname().nodename:
        return None
    return set(attempts[-1].get("cores") or ())


@dataclass
class Progress:
    """How far a run has come, from the last line of its metrics.csv."""

    step: int = 0
    total: int = 0
    wall_time: float = 0.0
    episodic_return: float | None = None

    @property
    def fraction(self) -> float:
        """Of the steps, in [0, 1]."""
        return min(1.0, self.step / self.total) if self.total else 0.0


def progress(folder: Path) -> Progress:
    """How far the newest run in a job's folder has come."""
    runs = run_folders(folder)
    if not runs:
        return Progress()
    made = read_json(runs[-1] / "args.json") or {}
    now = Progress(total=made.get("args", {}).get("total_timesteps", 0))
    try:
        with open(runs[-1] / "metrics.csv") as file:
            header = next(csv.reader([file.readline()]))
            lines = deque((line for line in file if line.endswith("\n")), maxlen=20)
    except (OSError, StopIteration):
        return now
    for line in lines:  # the last of them that saw an episode end has the return
        row = dict(zip(header, next(csv.reader([line]))))
        now.step, now.wall_time = int(row["global_step"]), float(row["wall_time_s"])
        now.episodic_return = float(row["charts/episodic_return"]) if row.get("charts/episodic_return") else now.episodic_return
    return now


# ---- One attempt -----------------------------------------------------------------------------------------------
class Elsewhere(Exception):
    """Another process is running the job."""


class Attempt:
    """The job of a folder, running in a child process: started, or resumed from its checkpoint.

    `process` is None if it has come to its end before. Raises Elsewhere if another process is running it.
    """

    def __init__(self, folder: Path, cores: list[int] | None = None, gpu: str | None = None):
        self.folder, self.process, self.told_to_stop = folder, None, False
        self.lock = open(folder / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise Elsewhere from None
        ended = finished_run(folder)
        if ended is not None:
            self.finish(int(run_status(ended) == "diverged"))
            return
        self.job = read_json(folder / "job.json")
        resume = None
        for run in run_folders(folder):  # without a checkpoint there is nothing to go on from
            if (run / "checkpoint.pt").exists():
                resume = run
            else:
                shutil.rmtree(run)
        words = [*self.job["command"], "--run-dir", str(folder)]
        words += ["--resume", str(resume)] if resume else []
        environment = os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        made_by = provenance()
        self.job["attempts"].append({
            "argv": ["python", *words], "host": os.uname().nodename, "cores": cores, "gpu_index": gpu, "start": now(),
            "load_at_start": load(), "resumed": resume is not None,
            **{key: made_by[key] for key in ("commit", "dirty", "versions", "cpu", "gpu")},
        })  # fmt: skip
        write_job(folder, self.job)
        with open(folder / "log.txt", "a") as log:
            print(f"# {now()} python {' '.join(words)}", file=log, flush=True)
            # The child inherits the lock and has a session of its own: it outlives a killed launcher, and Ctrl-C in
            # the launcher's terminal reaches it only through the launcher.
            self.process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[self.lock.fileno()], start_new_session=True,
            )  # fmt: skip
        if cores is not None:  # before the child has made threads, which inherit it
            os.sched_setaffinity(self.process.pid, cores)

    def poll(self) -> int | None:
        """The exit status once the attempt has ended, else None; the first time it is recorded."""
        if self.process is None:
            return 0
        code = self.process.poll()
        if code is not None and not self.lock.closed:
            self.job["attempts"][-1] |= {"end": now(), "load_at_end": load(), "exit_code": code}
            write_job(self.folder, self.job)
            self.finish(code)
        return code

    def finish(self, code: int) -> None:
        """Write the exit status and give the lock back."""
        write_atomically(self.folder / "exit_code", lambda new: new.write_text(f"{code}\n"))
        self.lock.close()

    def terminate(self) -> None:
        """Ask the script to checkpoint and stop."""
        if self.process is not None and self.process.poll() is None:
            self.told_to_stop = True
            self.process.terminate()

    def stop_once(self) -> None:
        """The same, if it has not been asked yet."""
        if not self.told_to_stop:
            self.terminate()

    def wait(self) -> int:
        """Wait for the end; the exit status."""
        while self.poll() is None:
            time.sleep(0.05)
        return self.poll()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def load() -> float | None:
    """How many processes wanted a core of this machine in the last minute, on average."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def attempt(folder: Path, cores: list[int] | None = None, gpu: str | None = None) -> int:
    """Run, resume or skip the job of `folder` here and now; the exit status of the script, or ELSEWHERE.

    SIGTERM and SIGINT are handed on to the script, which checkpoints and exits with 143 (main thread only).
    """
    try:
        running = Attempt(folder, cores, gpu)
    except Elsewhere:
        return ELSEWHERE
    handlers = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        handlers[number] = signal.signal(number, lambda *_: running.terminate())
    try:
        return running.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---- The launcher ----------------------------------------------------------------------------------------------
def split_cores(workers: int) -> list[list[int]] | list[None]:
    """The usable cores, dealt out to the workers; shared where there are fewer cores than workers."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * workers
    cores = sorted(os.sched_getaffinity(0))
    if workers >= len(cores):
        return [[cores[worker % len(cores)]] for worker in range(workers)]
    bounds = [worker * len(cores) // workers for worker in range(workers + 1)]
    return [cores[low:high] for low, high in zip(bounds, bounds[1:])]


def visible_gpus() -> list[str]:
    """The indices of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [index for index in visible.split(",") if index.strip()]
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    except OSError:
        return []
    return done.stdout.split() if done.returncode == 0 else []


@contextlib.contextmanager
def alone(path: Path):
    """Whether no other process is in this block with the same `path`: of two that count what runs, one would miss the other's."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@dataclass
class Launch:
    """The state of a launch: where each job stands, and what has happened."""

    folders: list[Path]
    running: dict[int, Attempt] = field(default_factory=dict)  # by worker
    failures: dict[Path, list[int]] = field(default_factory=dict)  # exit statuses in this launch
    stop_signal: int = 0

    def counts(self) -> dict[str, int]:
        """How many jobs are finished, running, failed and waiting."""
        here = {attempt.folder for attempt in self.running.values()}
        result = {"finished": 0, "running": len(here), "failed": 0, "waiting": 0}
        for folder in self.folders:
            if folder in here:
                continue
            status = "finished" if finished_run(folder) else "waiting"
            if status == "waiting" and len(self.failures.get(folder, [])) >= ATTEMPTS:
                status = "failed"
            result[status] += 1
        return result


def run_local(suite: Suite, run_dir: Path, workers: int, console: Console | None = None) -> int:
    """Run every job of the suite that has not finished, `workers` at a time; the launcher's exit status.

    0: all have come to their end; 1: some failed, named in a table; 130 or 143: stopped by a signal, everything checkpointed.
    """
    console = console or Console()
    folders = prepare(suite, run_dir)
    workers = min(workers, suite.workers or workers)
    state = Launch(folders)
    todo = deque(folder for folder in folders if finished_run(folder) is None)
    elsewhere: deque[Path] = deque()
    cores, gpus = split_cores(workers), visible_gpus()

    def used_by_others() -> list[set[int]]:
        """The cores of each run of the suite, chosen here or not, that another process has on this machine."""
        mine = {each.folder for each in state.running.values()}
        folders = {path.parent for path in (run_dir / suite.name).glob("*/lock")} - mine
        return [used for folder in folders if (used := cores_in_use(folder)) is not None]

    others = len(used_by_others())
    places = f"{workers} at a time" + (f" with the {others} that another process runs" if others else "")
    console.print(f"{suite.name}: {len(folders)} jobs, {len(folders) - len(todo)} finished, {places}, in {run_dir}")

    def ask_to_stop(number, frame):
        state.stop_signal = number
        for each in state.running.values():
            each.terminate()  # at the second signal the script stops at once

    def free_workers() -> list[int]:
        """Those without a run, less one for each run of another process; the workers whose cores such a run uses come last."""
        used = used_by_others()
        free = [worker for worker in range(workers) if worker not in state.running]
        free.sort(key=lambda worker: len(set().union(*used).intersection(cores[worker] or ())))
        return free[: max(0, workers - len(state.running) - len(used))]

    def start(worker: int) -> None:
        """Start the next job that no other process runs; such a job is looked at again after all others."""
        source = todo or elsewhere
        for _ in range(len(source)):
            folder = source.popleft()
            try:
                started = Attempt(folder, cores[worker], gpus[worker % len(gpus)] if gpus else None)
            except Elsewhere:
                elsewhere.append(folder)
                continue
            if started.process is not None:
                state.running[worker] = started
                view.say(f"start  {folder.name}{' (resumed)' if started.job['attempts'][-1]['resumed'] else ''}")
                return

    def end(worker: int, code: int) -> None:
        """Tell what became of a job, and queue it again if it failed for the first time."""
        folder = state.running.pop(worker).folder
        ended = finished_run(folder)
        if ended is not None:
            view.say(f"done   {folder.name}{', diverged' if run_status(ended) == 'diverged' else ''}")
        elif state.stop_signal:
            view.say(f"paused {folder.name}")
        else:
            failed = state.failures.setdefault(folder, [])
            failed.append(code)
            again = len(failed) < ATTEMPTS
            view.say(f"FAILED {folder.name}: exit status {code}{', once more' if again else ''}")
            if again:
                todo.append(folder)

    handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    view = View(state, console)
    try:
        with view:
            while state.running or (not state.stop_signal and (todo or elsewhere)):
                if len(state.running) < workers and (todo or elsewhere):
                    with alone(run_dir / f"{suite.name}.lock") as here:
                        for worker in free_workers() if here else ():
                            if not state.stop_signal:
                                start(worker)
                if state.stop_signal:  # the signal may have come while a job was being started
                    for each in state.running.values():
                        each.stop_once()
                for worker, each in list(state.running.items()):
                    code = each.poll()
                    if code is not None:
                        end(worker, code)
                view.refresh()
                time.sleep(0.1)
    finally:  # after an error of the launcher itself (a full disk, say) its runs are still to checkpoint
        for each in state.running.values():
            each.stop_once()
            each.process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    failed = {folder: codes for folder, codes in state.failures.items() if finished_run(folder) is None}
    console.print(", ".join(f"{number} {status}" for status, number in state.counts().items() if number))
    if failed:
        console.print(failure_table(failed))
    if state.stop_signal:
        console.print("stopped; the same command goes on from the checkpoints")
        return 128 + state.stop_signal
    return 1 if failed else 0


def failure_table(failures: dict[Path, list[int]]) -> Table:
    """Jobs that failed, with the last line of their logs."""
    table = Table("failed job", "exit status", "last line of its log.txt", title=f"{len(failures)} failed")
    for folder, codes in failures.items():
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        table.add_row(folder.name, ", ".join(map(str, codes)), lines[-1] if lines else "")
    return table


class View:
    """What the launcher shows: a live table on a terminal, else a line for each event and one a minute."""

    def __init__(self, state: Launch, console: Console):
        self.state, self.console, self.started, self.last = state, console, time.monotonic(), 0.0
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.at_start: float | None = None

    def __enter__(self):
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error):
        if self.live is not None:
            self.live.stop()

    def say(self, line: str) -> None:
        """One event."""
        self.console.print(line, highlight=False, soft_wrap=True)

    def refresh(self) -> None:
        """Draw anew, at most once a second (a minute, where lines are printed)."""
        if time.monotonic() - self.last < (1.0 if self.live is not None else 60.0):
            return
        first, self.last = self.last == 0.0, time.monotonic()
        counts = self.state.counts()
        now_running = {attempt.folder: progress(attempt.folder) for attempt in self.state.running.values()}
        summary = ", ".join(f"{number} {status}" for status, number in counts.items() if number) + self.time_left(
            counts["finished"] + sum(each.fraction for each in now_running.values()), counts["failed"]
        )
        if self.live is None:
            if not first:
                self.say(summary)
            return
        table = Table("running", "steps", "steps/s", "return", title=summary, title_justify="left")
        for folder, each in now_running.items():
            speed = f"{each.step / each.wall_time:,.0f}" if each.wall_time else ""
            last = f"{each.episodic_return:,.1f}" if each.episodic_return is not None else ""
            table.add_row(folder.name, f"{each.step:,} of {each.total:,}", speed, last)
        self.live.update(table, refresh=True)

    def time_left(self, done: float, failed: int) -> str:
        """In words, from the pace of this launch in jobs."""
        if self.at_start is None:
            self.at_start = done
        pace = (done - self.at_start) / (time.monotonic() - self.started)
        left = len(self.state.folders) - failed - done
        return f", about {left / pace / 60:,.0f} min left" if pace > 0 and left > 0 else ""
