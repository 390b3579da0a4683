"""Training loops that take turns: the one way in which the studies measure the scripts' speed.

Loops take turns in one run on one machine, A B C C B A A B C ..., so that a change of the machine's load
meets all alike. A number is the median over the turns with (lowest..highest), and a ratio is taken within a
turn before its median. Absolute times belong to the machine that is named beside them; ratios carry over
better. A busy machine spoils all of them, so its load is kept; `cpu`, the processor time of all threads,
suffers least.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmark.studies.study import BadInput, Row
from benchmark.suites import ROOT

Numbers = dict[str, float]  # by name
Samples = dict[str, dict[str, list[float]]]  # of each competitor the numbers of its turns, by name
# A loop is a function of `rollout_done`, which it calls after each rollout with its environment `steps` and
# with the seconds of its PARTS; nested_critic and response are parts of update.
PARTS = ("env", "policy", "update", "nested_critic", "response")
Loop = Callable[[Callable[[Numbers], None]], None]


def in_turns(competitors: dict[str, Callable[[], Numbers]], rounds: int) -> Samples:
    """What each competitor's call returns, turn by turn; every second round is in the opposite order."""
    samples: Samples = {name: {} for name in competitors}
    for number in range(rounds):
        for name in list(competitors)[:: -1 if number % 2 else 1]:
            for key, value in competitors[name]().items():
                samples[name].setdefault(key, []).append(value)
    return samples


def ratios(samples: list[float], reference: list[float]) -> list[float]:
    """Turn by turn, samples over reference."""
    return [sample / other for sample, other in zip(samples, reference, strict=True)]


def loop_rows(samples: Samples, references: Callable[[str], dict[str, str]], **labels: str) -> list[Row]:
    """A row for each loop: steps per second; for each of its `references`, label -> loop, the ratios of time,
    processor time and the update's time; and milliseconds of an environment step, in all and by part."""
    of_step = {
        name: {key: ratios(each[key], each["steps"]) for key in each} for name, each in samples.items()
    }
    rows: list[Row] = []
    for name, mine in of_step.items():
        row: Row = labels | {"loop": name, "steps_per_s": [1 / each for each in mine["rollout"]]}
        for label, other in references(name).items():
            for word, key in (("time", "rollout"), ("cpu", "cpu"), ("update", "update")):
                row[f"{word}_over_{label}"] = ratios(mine[key], of_step[other][key])
        rows.append(row | {f"{key}_ms": [1e3 * each for each in mine[key]] for key in mine if key != "steps"})
    return rows


def loops_in_turns(loops: dict[str, Loop], rounds: int, rollouts: int = 1, warmup: int = 1) -> Samples:
    """Means over the rollouts of each turn, `rollouts` of them, of what the loops tell, and of `rollout` and
    `cpu`, the seconds of a rollout and its processor time.

    Every loop lives in a process of its own that sleeps when it is not its turn, so each is set up and warmed
    up (`warmup` rollouts that do not count) only once. Raises BadInput where a script refuses its arguments.
    """
    context, processes, pipes = multiprocessing.get_context("fork"), [], {}

    def turn(name: str, todo: int) -> Numbers:
        pipes[name].send(todo)
        if isinstance(answer := pipes[name].recv(), Exception):
            raise answer
        return answer

    for name, loop in loops.items():
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, loop, end), daemon=True))
        processes[-1].start()
        end.close()
    try:
        for name in loops:
            turn(name, warmup)
        return in_turns({name: partial(turn, name, rollouts) for name in loops}, rounds)
    finally:
        for process, pipe in zip(processes, pipes.values()):
            with contextlib.suppress(BrokenPipeError):  # of one that has refused
                pipe.send(0)
            process.join()


class Enough(Exception):
    """Ends a training loop after its last turn."""


def serve(name: str, loop: Loop, pipe) -> None:
    """Run `loop` by turns: for a number of rollouts received, send the means of their numbers; 0 ends it."""
    os.chdir(tempfile.gettempdir())  # MuJoCo writes its log where it is
    parent, done = os.getppid(), []

    def next_turn() -> int:
        while not pipe.poll(1.0):
            if os.getppid() != parent:  # it was killed; its end of the pipe lives on in the other loops
                raise Enough
        if not (rollouts := pipe.recv()):
            raise Enough
        return rollouts

    def rollout_done(numbers: Numbers) -> None:
        nonlocal todo, start
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        done.append(numbers | dict(zip(("rollout", "cpu"), seconds)))
        if len(done) == todo:
            pipe.send({key: statistics.mean(each[key] for each in done) for key in done[0]})
            done.clear()
            todo = next_turn()
        start = time.perf_counter(), time.process_time()

    warnings.simplefilter("ignore")  # Gymnasium deprecates the v4 tasks
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        try:
            todo, start = next_turn(), (time.perf_counter(), time.process_time())
            loop(rollout_done)
            pipe.send(BadInput(f"{name} has made all its steps; ask for fewer --rounds"))
        except Enough:
            pass
        except BaseException as error:
            refused = type(error).__name__ == "BadInput"  # each script has one of its own
            pipe.send(BadInput(f"{name}: {error}") if refused else RuntimeError(f"{name}: {error!r}"))


def script_loop(script: str, words: str, rollout_done, tree: Path = ROOT, prepare=lambda _: None) -> None:
    """The training of a script of `tree` with these words, as it is, logging included: its log entry marks
    the end of a rollout. `prepare` gets the script's module first."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, tree / script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prepare(module)
    log, last_step = module.Run.log, 0

    def log_and_tell(run, global_step, metrics, *rest):
        nonlocal last_step
        log(run, global_step, metrics, *rest)
        seconds = {part: metrics[f"time/{part}"] for part in PARTS if metrics.get(f"time/{part}") is not None}
        steps, last_step = global_step - last_step, global_step
        rollout_done(seconds | {"steps": steps})

    module.Run.log = log_and_tell
    with tempfile.TemporaryDirectory() as folder:
        first = module.Args if module.parse_args.__code__.co_argcount == 2 else None  # commits before b115306
        given = [*words.split(), "--run-dir", folder]
        module.train(module.parse_args(first, given) if first else module.parse_args(given))
