"""Run the jobs of a suite on this machine: pinned to cores, resumable, each at most once at a time.

A job has a folder `RUN_DIR/SUITE/JOB/`:

    job.json     suite, method, environment, seed, command; and its attempts (command line, commit, versions,
                 machine, start, end, load average at both, exit status)
    log.txt      what the script printed, attempt after attempt
    lock         held (flock) by the training process itself, so that it outlives a killed launcher
    {run}/       the script's own run folder (docs/run_folder.md)

Nothing else is remembered: what is finished, interrupted or failed is read from these folders, so a launcher
may be killed at any moment and started again, and several may share the work. A run that diverged, its numbers
not finite any more, is finished: it would diverge again. Each worker has a place with cores of its own: a
file in `RUN_DIR/SUITE/.places/HOST/`, locked by its training process as well. So what a killed launcher left
behind, and the runs of another launcher on the same machine, take the places of workers.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pydantic

from benchmark.machine import provenance, read_as, write_atomically
from benchmark.suites import ROOT, BadSuite, Suite

# A script that was asked to stop checkpoints; one that was asked while it still imported just ends.
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)
ATTEMPTS = 2  # of a job that fails, in one launch
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


# ---- A job's folder --------------------------------------------------------------------------------------
class JobFile(pydantic.BaseModel):
    """job.json."""

    job: str
    suite: str
    method: str
    environment: str
    seed: int
    command: list[str]
    attempts: list[dict[str, Any]] = []

    def unrecorded(self) -> bool:
        """Whether nothing is known of the end of the last attempt."""
        return bool(self.attempts) and "exit_code" not in self.attempts[-1]

    def write(self, folder: Path) -> None:
        """Replace job.json."""
        text = self.model_dump_json(indent=1) + "\n"
        write_atomically(folder / "job.json", lambda new: new.write_text(text))


class Result(pydantic.BaseModel):
    """What is needed of the result.json of a run folder."""

    status: str
    global_step: int = 0
    wall_time_s: float | None = None
    final_return: float | None = None


def prepare(suite: Suite, run_dir: Path) -> list[Path]:
    """Create the folder of every job, with its job.json, and return them in the suite's order.

    What ended while no launcher lived is put on record. Raises BadSuite if a folder belongs to a job of that name
    with another command, or cannot be written.
    """
    folders = {run_dir / suite.name / job.name: job for job in suite.jobs()}
    known = {folder: read_as(JobFile, folder / "job.json") for folder in folders}
    for folder, job in folders.items():
        if known[folder] is not None and known[folder].command != job.command:
            command = " ".join(known[folder].command)
            other = f"{folder} is a job of other arguments ({command}); name another --run-dir or remove it"
            raise BadSuite(f"{suite.path.name}: methods.{job.method}: {other}")
    try:
        for folder, job in folders.items():
            if known[folder] is None:
                folder.mkdir(parents=True, exist_ok=True)
                who = {
                    key: getattr(job, key) for key in ("suite", "method", "environment", "seed", "command")
                }
                JobFile(job=job.name, **who).write(folder)
            elif known[folder].unrecorded() and (lock := locked(folder / "lock")):
                with lock:
                    record_end(folder)
    except OSError as error:
        raise BadSuite(f"--run-dir {run_dir} cannot be written: {error}; name another folder") from None
    return list(folders)


def record_end(folder: Path) -> JobFile:
    """Put on record how the last attempt ended, if no launcher lived to see it; None: it was killed.

    To be called with the job's lock. The job.json as it is then.
    """
    job = read_as(JobFile, folder / "job.json")
    if job.unrecorded():
        runs = run_folders(folder)
        files = [folder / "log.txt", *(runs[-1].iterdir() if runs else ())]
        last = max((path.stat().st_mtime for path in files if path.exists()), default=None)
        codes = {"finished": 0, "diverged": 1, "failed": 1, "interrupted": 128 + signal.SIGTERM}
        seen = {"end": now(last), "exit_code": codes.get(run_status(runs[-1]) if runs else None)}
        job.attempts[-1] |= seen | {"recorded": "later, from the run folder"}
        job.write(folder)
    return job


def run_folders(folder: Path) -> list[Path]:
    """The script's run folders in a job's folder, oldest first."""
    return sorted((path.parent for path in folder.glob("*/args.json")), key=lambda path: path.stat().st_mtime)


def run_status(run: Path) -> str | None:
    """What the result.json of a run folder says; None without one that is whole."""
    try:
        result = read_as(Result, run / "result.json")
    except BadSuite:
        return None
    return result and result.status


def finished_run(folder: Path) -> Path | None:
    """The run folder of a job that has come to its end: all its steps, or numbers that are not finite."""
    return next((run for run in run_folders(folder) if run_status(run) in ("finished", "diverged")), None)


def job_status(folder: Path) -> str:
    """finished, running, failed, interrupted or waiting."""
    if finished_run(folder) is not None:
        return "finished"
    if is_running(folder):
        return "running"
    job = read_as(JobFile, folder / "job.json")
    if job is None or not job.attempts:
        return "waiting"
    code = job.attempts[-1].get("exit_code")
    return "interrupted" if code is None or code in STOPPED else "failed"


def is_running(folder: Path) -> bool:
    """Whether a training process holds a job's folder."""
    if not (folder / "lock").exists():
        return False
    file = locked(folder / "lock", "r", fcntl.LOCK_SH)
    if file is not None:
        file.close()
    return file is None


def locked(path: Path, mode: str = "a", kind: int = fcntl.LOCK_EX):
    """The file, locked until it is closed; None if another process has locked it."""
    file = open(path, mode)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def now(seconds: float | None = None) -> str:
    """A time in UTC, to the second."""
    return datetime.fromtimestamp(seconds or time.time(), timezone.utc).isoformat(timespec="seconds")


def load() -> float | None:
    """How many processes wanted a core of this machine in the last minute, on average."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


# ---- One attempt -----------------------------------------------------------------------------------------
class Elsewhere(Exception):
    """Another process is running the job."""


class Attempt:
    """The job of a folder, running in a child process: started, or resumed from its checkpoint.

    `process` is None if it has come to its end before. The child holds the lock, and `places` (locked files).
    Raises Elsewhere if another process is running it.
    """

    def __init__(self, folder: Path, cores=None, gpu=None, track: bool = False, places: Iterable = ()):
        self.folder, self.process, self.asked = folder, None, threading.Lock()
        self.lock = locked(folder / "lock")
        if self.lock is None:
            raise Elsewhere
        self.job = record_end(folder)
        if finished_run(folder) is not None:
            self.lock.close()
            return
        checkpoints = [run for run in run_folders(folder) if (run / "checkpoint.pt").exists()]
        words = [*self.job.command, "--run-dir", str(folder.resolve()), *(["--track"] if track else [])]
        words += ["--resume", str(checkpoints[-1].resolve())] if checkpoints else []
        environment = os.environ | ONE_THREAD | {"WANDB_RUN_GROUP": self.job.suite}
        environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        said = {"argv": ["python", *words], "host": os.uname().nodename, "cores": cores, "gpu_index": gpu}
        said |= {"start": now(), "load_at_start": load(), "resumed": bool(checkpoints)}
        said |= {key: value for key, value in provenance().items() if key not in ("cores", "threads")}
        self.job.attempts.append(said)
        self.job.write(folder)
        with open(folder / "log.txt", "a") as log:
            print(f"# {now()} python {' '.join(words)}", file=log, flush=True)
            held = [file.fileno() for file in (self.lock, *places)]
            # A session of its own: Ctrl-C in the launcher's terminal reaches it only through the launcher.
            apart = {"stdin": subprocess.DEVNULL, "pass_fds": held, "start_new_session": True}
            words = [sys.executable, *words]
            self.process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, **apart)
        if cores is not None:  # before the child has made threads, which inherit it
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(self.process.pid, cores)

    def poll(self) -> int | None:
        """The exit status once the attempt has ended, else None; the first time it is recorded."""
        code = 0 if self.process is None else self.process.poll()
        if code is not None and not self.lock.closed:
            self.job.attempts[-1] |= {"end": now(), "load_at_end": load(), "exit_code": code}
            self.job.write(self.folder)
            self.lock.close()
        return code

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask the script, once, to checkpoint and stop."""
        if self.process is not None and self.asked.acquire(blocking=False):
            self.process.send_signal(number)


# ---- The launcher ----------------------------------------------------------------------------------------
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
    import torch  # seconds, which `report` need not wait

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def take_places(folder: Path, worker: int, workers: int) -> list | None:
    """The locked files of a worker's place; None while a run of another launcher has it.

    Places that more workers had before are dealt out to those of now: one worker waits until all are free.
    """
    known = [int(path.name) for path in folder.iterdir()]
    taken = []
    for place in range(worker, max([workers, *(number + 1 for number in known)]), workers):
        taken.append(locked(folder / str(place)))
        if taken[-1] is None:
            let_go(taken[:-1])
            return None
    return taken


def let_go(files: list) -> None:
    """Close files, and so give their locks back."""
    for file in files:
        file.close()


class Launch:
    """The jobs of a suite, and the threads that take one after the other, each in its own place."""

    def __init__(self, suite: Suite, run_dir: Path, workers: int, track: bool):
        self.folders, self.track, self.workers = prepare(suite, run_dir), track, workers
        self.todo = deque(folder for folder in self.folders if finished_run(folder) is None)
        self.places = run_dir / suite.name / ".places" / os.uname().nodename
        self.places.mkdir(parents=True, exist_ok=True)
        self.cores, self.gpus = split_cores(workers), visible_gpus()
        self.running: dict[Path, Attempt] = {}
        self.failures: dict[Path, list[int]] = {}  # exit statuses in this launch
        self.stop_signal, self.before = 0, self.finished()
        self.started = self.told = time.monotonic()
        number = len(self.folders)
        say(f"{suite.name}: {number} jobs, {self.before} finished, {workers} at a time, in {run_dir}")

    def run(self) -> int:
        """The launcher's exit status (run_local)."""
        numbers = signal.SIGINT, signal.SIGTERM
        handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        try:
            with ThreadPoolExecutor(self.workers) as pool:
                threads = [pool.submit(self.work, worker) for worker in range(self.workers)]
                while wait(threads, 1.0, FIRST_EXCEPTION).not_done:
                    self.show()
                    if any(thread.done() and thread.exception() for thread in threads):  # a full disk, say
                        self.on_signal(signal.SIGTERM)
            for thread in threads:
                thread.result()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        say(self.summary())
        failed = {folder: codes for folder, codes in self.failures.items() if finished_run(folder) is None}
        for folder, codes in failed.items():
            lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
            say(f"failed: {folder.name}, exit status {', '.join(map(str, codes))}: {lines[-1]}")
        if self.stop_signal:
            say("stopped; the same command goes on from the checkpoints")
        return 128 + self.stop_signal if self.stop_signal else int(bool(failed))

    def work(self, worker: int) -> None:
        """Take jobs, one after the other, until none is left; each when this worker's place is free."""
        waited = False
        while self.todo and not self.stop_signal:
            places = take_places(self.places, worker, self.workers)
            if places is None:
                if not waited:
                    say(f"worker {worker + 1} waits: a run of another launcher has its place")
                waited = True
                time.sleep(0.2)
                continue
            try:
                self.run_next(worker, places)
            finally:
                let_go(places)

    def run_next(self, worker: int, places: list) -> None:
        """Run a job to its end, if it is not running elsewhere; after a first failure it is queued again."""
        try:
            folder = self.todo.popleft()
        except IndexError:  # another worker took the last one
            return
        gpu = self.gpus[worker % len(self.gpus)] if self.gpus else None
        try:
            attempt = Attempt(folder, self.cores[worker], gpu, self.track, places)
        except Elsewhere:
            self.todo.append(folder)
            time.sleep(0.2)
            return
        if attempt.process is None:
            return
        self.running[folder] = attempt
        say(f"start  {folder.name}{' (resumed)' if attempt.job.attempts[-1]['resumed'] else ''}")
        if self.stop_signal:  # it came while the job was being started
            attempt.stop()
        attempt.process.wait()
        code = attempt.poll()
        del self.running[folder]
        ended = finished_run(folder)
        if ended is not None:
            say(f"done   {folder.name}{', diverged' if run_status(ended) == 'diverged' else ''}")
        elif self.stop_signal:
            say(f"paused {folder.name}")
        else:
            codes = self.failures.setdefault(folder, [])
            codes.append(code)
            again = len(codes) < ATTEMPTS
            say(f"FAILED {folder.name}: exit status {code}{', once more' if again else ''}")
            if again:
                self.todo.append(folder)

    def on_signal(self, number: int, frame=None) -> None:
        """Let every run checkpoint and stop; at a second signal, at once."""
        again, self.stop_signal = self.stop_signal, self.stop_signal or number
        for attempt in list(self.running.values()):
            if again and frame is not None:
                attempt.process.terminate()
            attempt.stop()

    def show(self) -> None:
        """A line a minute: how many jobs are where, and the time left by the pace of this launch."""
        if time.monotonic() - self.told > 60:
            self.told = time.monotonic()
            done, left = self.finished() - self.before, len(self.folders) - self.before
            minutes = (self.told - self.started) / 60 * (left / done - 1) if done else 0
            say(self.summary() + (f", about {minutes:,.0f} min left" if done else ""))

    def finished(self) -> int:
        """How many jobs have come to their end."""
        return sum(finished_run(folder) is not None for folder in self.folders)

    def summary(self) -> str:
        """How many jobs are finished, running, failed and waiting."""
        failed = sum(len(codes) >= ATTEMPTS for codes in self.failures.values())
        counts = {"finished": self.finished(), "running": len(self.running), "failed": failed}
        counts["waiting"] = len(self.folders) - sum(counts.values())
        return ", ".join(f"{number} {status}" for status, number in counts.items() if number)


def say(line: str) -> None:
    """One event."""
    print(line, flush=True)


def run_local(suite: Suite, run_dir: Path, workers: int, track: bool = False) -> int:
    """Run every job of the suite that has not finished, `workers` at a time; the launcher's exit status.

    0: all have come to their end; 1: some failed; 130 or 143: stopped by a signal, everything checkpointed.
    """
    return Launch(suite, run_dir, min(workers, suite.workers or workers), track).run()
