"""Competitors that take turns, and the tables of what they took; for the modules benchmark/speed*.py.

Competitors take turns, A B C A B C ..., so that a change of the machine's load meets all of them alike; a number is the
median over the turns with (lowest..highest), and a ratio is taken within a turn before its median. Absolute times belong
to the machine that is named beside them; ratios carry over better. A busy machine spoils all of them.
"""

import contextlib
import csv
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

from benchmark.machine import provenance

# A table is a list of rows; a row maps column names to a word, a number, or the list of one number's samples.
Row = dict[str, str | float | list[float]]


# ---- Calls -----------------------------------------------------------------------------------------------------
def milliseconds(competitors: dict[str, Callable[[], object]], rounds: int, turn: float = 0.02) -> dict[str, list[float]]:
    """Milliseconds of one call of each competitor, for each of `rounds` turns.

    A turn repeats the call for about `turn` seconds; the first call, which sets the number of repetitions, is not timed.
    """
    repeats = {}
    for name, call in competitors.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(turn / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, call in competitors.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append(1e3 * (time.perf_counter() - start) / repeats[name])
    return samples


def ratios(samples: list[float], reference: list[float]) -> list[float]:
    """Turn by turn, samples over reference."""
    return [sample / other for sample, other in zip(samples, reference, strict=True)]


# ---- Training loops --------------------------------------------------------------------------------------------
# A loop is a function of `rollout_done`, which it calls after each rollout with its seconds of env, policy and update.
Loop = Callable[[Callable[[dict[str, float]], None]], None]


def loops_in_turns(
    loops: dict[str, Loop], rounds: int, rollouts: int, warmup: int = 1
) -> dict[str, list[dict[str, float]]]:
    """Mean seconds of a rollout of each loop, for each of `rounds` turns of `rollouts` rollouts.

    Every loop lives in a process of its own that sleeps when it is not its turn, so each is set up and warmed up
    (`warmup` rollouts that do not count) only once, and the turns are as short as a rollout.
    """
    context = multiprocessing.get_context("fork")
    processes, pipes, samples = [], {}, {name: [] for name in loops}
    for name, loop in loops.items():
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=serve_turns, args=(loop, end), daemon=True))
        processes[-1].start()
        end.close()
    for turn in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(rollouts if turn else warmup)
            seconds = pipe.recv()
            if turn:
                samples[name].append(seconds)
    for process, pipe in zip(processes, pipes.values()):
        pipe.send(0)
        process.join()
    return samples


class Enough(Exception):
    """Ends a training loop after its last turn."""


def serve_turns(loop: Loop, pipe) -> None:
    """Run `loop` by turns: for each number of rollouts received, send their mean seconds; 0 ends it."""
    os.chdir(tempfile.gettempdir())  # MuJoCo writes its log where it is
    parent = os.getppid()

    def next_turn() -> int:
        while not pipe.poll(1.0):
            if os.getppid() != parent:  # it was killed; its end of the pipe lives on in the other loops' processes
                return 0
        return pipe.recv()

    todo, start, done = next_turn(), time.perf_counter(), []
    if todo == 0:
        return

    def rollout_done(seconds: dict[str, float]) -> None:
        nonlocal todo, start
        done.append(seconds | {"rollout": time.perf_counter() - start})
        if len(done) == todo:
            pipe.send({name: statistics.mean(each[name] for each in done) for name in done[0]})
            done.clear()
            todo = next_turn()
            if todo == 0:
                raise Enough
        start = time.perf_counter()

    warnings.simplefilter("ignore")  # Gymnasium deprecates the v4 tasks
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        with contextlib.suppress(Enough):
            loop(rollout_done)


def script_loop(script, words: list[str], rollout_done: Callable[[dict[str, float]], None]) -> None:
    """The training of one of the scripts, as it is, logging included: its log entry marks the end of a rollout."""
    log = script.Run.log

    def log_and_tell(run, global_step, metrics, *rest):
        log(run, global_step, metrics, *rest)
        rollout_done({name: metrics[f"time/{name}"] for name in ("env", "policy", "update")})

    script.Run.log = log_and_tell
    script.train(script.parse_args(words))


def with_processor_time(loop: Loop) -> Loop:
    """The loop, whose rollouts tell their processor time as well."""

    def run(rollout_done: Callable[[dict[str, float]], None]) -> None:
        start = time.process_time()

        def done(seconds: dict[str, float]) -> None:
            nonlocal start
            rollout_done(seconds | {"cpu": time.process_time() - start})
            start = time.process_time()

        loop(done)

    return run


# ---- Tables ----------------------------------------------------------------------------------------------------
def cell(value: str | float | list[float]) -> str:
    """A value of a row in three digits, samples as median (lowest..highest)."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 1:
        return cell(value[0])
    if isinstance(value, list):
        return f"{cell(statistics.median(value))} ({cell(min(value))}..{cell(max(value))})"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def show(title: str, rows: list[Row]) -> None:
    """Print a Markdown table: samples as median (lowest..highest)."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    print(f"\n**{title}**\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n", flush=True)


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line a row: samples as their median, with columns _min and _max beside it."""
    lines = []
    for row in rows:
        line: dict[str, str | float] = {}
        for name, value in row.items():
            samples = value if isinstance(value, list) else None
            line[name] = value if samples is None else statistics.median(samples)
            line |= {} if samples is None else {f"{name}_min": min(samples), f"{name}_max": max(samples)}
        lines.append({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in line.items()})
    with open(path, "w", newline="") as file:
        names = dict.fromkeys(name for line in lines for name in line)  # some columns are empty in some rows
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(lines)


def provenance_of(module: str) -> dict:
    """What made the numbers of benchmark.`module`: command, commit, versions, machine, date. A child looks: a process that has
    asked for a CUDA device can fork none that uses it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        seen = child.submit(provenance).result()
    del seen["threads"]  # of this process; those that are measured have their own
    return seen | {
        "script": f"benchmark/{module}.py",
        "command": shlex.join(["python", "-m", f"benchmark.{module}", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
