"""What the studies share: checked arguments, refusals in one sentence, tables, files replaced as a whole.

A table is a list of rows; a row maps column names to a word, a number, or the list of one number's samples.
"""

import json
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import pandas as pd
import pydantic
import tyro
from pydantic import Field

from benchmark.machine import provenance, write_atomically

Row = dict[str, str | float | list[float]]
Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
AT_LEAST_ONE = Field(min_length=1)
PRINTED = 100  # rows of a table; a longer one is only written


class BadInput(Exception):
    """One sentence that names the argument or the file and what is wrong; exit status 2."""


class Args(pydantic.BaseModel, extra="forbid"):
    """Arguments whose ranges are checked whenever they are made."""

    results_dir: Path | None = None
    """folder of the csv and json files; default: nothing is written"""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def one_sentence(cls, values, check):
        """Raise BadInput for the first argument that is out of its range."""
        try:
            return check(values)
        except pydantic.ValidationError as error:
            wrong = error.errors()[0]
            name, message = str(wrong["loc"][0]).replace("_", "-"), wrong["msg"].removeprefix("Value error, ")
            raise BadInput(f"--{name} is {wrong['input']!r}: {message}") from None


# Measures table by table, and gives each as soon as it is made: its name and its rows, or a file's name and
# bytes.
Measure = Callable[[Args], Iterator[tuple[str, list[Row] | bytes]]]


def command(arguments: type[Args], measure: Measure, module: str, description: str) -> None:
    """The command line of a study; bad input ends it with one sentence and exit status 2."""
    try:
        run(tyro.cli(arguments, description=description), measure, module)
    except Exception as error:
        if type(error).__name__ not in ("BadInput", "BadSuite"):  # each script has a BadInput of its own
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: Args, measure: Measure, module: str) -> None:
    """Measure, print and, if asked, write of each table {name}.csv and {name}.json: what made it, the load,
    and all samples. `module` is the study's file. Raises BadInput, before anything is measured where it can.
    """
    with multiprocessing.get_context("fork").Pool(1) as child:  # who has asked for a CUDA device cannot fork
        made_by = child.apply(provenance)
    if getattr(args, "device", "cpu") == "cuda" and made_by["gpu"] is None:
        raise BadInput("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    del made_by["threads"]  # of this process; those that are measured have their own
    made_by["command"] = shlex.join(["python", "-m", f"benchmark.studies.{Path(module).stem}", *sys.argv[1:]])
    made_by["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        if args.results_dir:
            args.results_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.results_dir).close()
    except OSError as error:
        raise unwritable(args, error) from error
    print(f"{made_by['cpu']}, GPU {made_by['gpu']}, commit {made_by['commit']}: {made_by['command']}")
    made_by["load_average"], start = [os.getloadavg()], time.perf_counter()
    for name, content in measure(args):
        made_by["load_average"].append(os.getloadavg())
        made_by["seconds"] = round(time.perf_counter() - start)
        if not isinstance(content, bytes) and len(content) <= PRINTED:
            loads = " to ".join(f"{load[0]:.1f}" for load in made_by["load_average"])
            show(f"{name}, after {made_by['seconds']} s, load average {loads}", content)
        if args.results_dir:
            files = {name: content} if isinstance(content, bytes) else files_of(name, content, made_by)
            try:
                for file, text in files.items():
                    write_atomically(args.results_dir / file, lambda new, text=text: new.write_bytes(text))
            except OSError as error:
                raise unwritable(args, error) from error


def unwritable(args: Args, error: OSError) -> BadInput:
    """The refusal of a results folder."""
    return BadInput(f"--results-dir {args.results_dir}: {error.strerror}; name another folder")


# ---- Tables ----------------------------------------------------------------------------------------
def cell(value: str | float | list[float]) -> str:
    """A value in three digits, samples as median (lowest..highest)."""
    if isinstance(value, list) and len(value) > 1:
        return f"{cell(statistics.median(value))} ({cell(min(value))}..{cell(max(value))})"
    value = value[0] if isinstance(value, list) else value
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 or value % 1 == 0 else f"{value:.3g}"


def show(title: str, rows: list[Row]) -> None:
    """Print a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([cell(row.get(name, "")) for name in names] for row in rows)]
    print(f"\n**{title}**\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n", flush=True)


def files_of(name: str, rows: list[Row], made_by: dict) -> dict[str, bytes]:
    """A csv file with samples as their median and columns _min and _max, numbers in six digits; a json file
    with what made the rows and, if there are samples, the rows."""
    lines, content = [dict(row) for row in rows], {"provenance": made_by}
    for line in lines:
        for column, samples in list(line.items()):
            if isinstance(samples, list):
                content["rows"] = rows
                line[column] = statistics.median(samples)
                line |= {f"{column}_min": min(samples), f"{column}_max": max(samples)}
    table = pd.DataFrame(lines).to_csv(index=False, float_format="%.6g")
    return {f"{name}.csv": table.encode(), f"{name}.json": (json.dumps(content, indent=1) + "\n").encode()}
