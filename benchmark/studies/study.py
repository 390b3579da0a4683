"""What the studies share: checked arguments, refusals in one sentence, tables, files replaced as a whole.

A table is a list of rows; a row maps column names to a word, a number, or the list of one number's samples.
"""

import contextlib
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

from benchmark.machine import provenance

Row = dict[str, str | float | list[float]]
Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
AT_LEAST_ONE = Field(min_length=1)


class BadInput(Exception):
    """One sentence that names the argument or the file and what is wrong; exit status 2."""


class CheckedArgs(pydantic.BaseModel, extra="forbid"):
    """Arguments whose ranges are checked whenever they are made."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def one_sentence(cls, values, check):
        """Raise BadInput for the first argument that is out of its range."""
        try:
            return check(values)
        except pydantic.ValidationError as error:
            wrong = error.errors()[0]
            name = str(wrong["loc"][0]).replace("_", "-")
            raise BadInput(f"--{name} is {wrong['input']!r}: {wrong['msg']}") from None


class Args(CheckedArgs):
    """What a study can be told that measures."""

    results_dir: Path | None = None
    """folder of the csv and json files; default: nothing is written"""


def command(main: Callable[[CheckedArgs], None], arguments: type[CheckedArgs], description: str) -> None:
    """The command line of a study; bad input ends it with one sentence and exit status 2."""
    try:
        main(tyro.cli(arguments, description=description))
    except Exception as error:
        if type(error).__name__ not in ("BadInput", "BadSuite"):  # each script has a BadInput of its own
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def writing(args: Args) -> Iterator[None]:
    """Raises BadInput where the results folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"--results-dir {args.results_dir}: {error.strerror}; name another folder") from error


def begin(args: Args, module: str, cuda: bool = False) -> dict:
    """What makes the numbers of the study in the file `module`: command, commit, versions, machine, date.

    Raises BadInput where a CUDA device is needed and there is none, or where the folder cannot be written.
    """
    with multiprocessing.get_context("fork").Pool(1) as child:  # who has asked for a CUDA device cannot fork
        made_by = child.apply(provenance)
    if cuda and made_by["gpu"] is None:
        raise BadInput("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if args.results_dir:
        with writing(args):
            args.results_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.results_dir).close()
    words = shlex.join(["python", "-m", f"benchmark.studies.{Path(module).stem}", *sys.argv[1:]])
    print(f"{made_by['cpu']}, GPU {made_by['gpu']}, commit {made_by['commit']}: {words}")
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return made_by | {"command": words, "date": date}


def report(
    args: Args,
    made_by: dict,
    part: str,
    title: str,
    measure: Callable[[], list[Row]],
    shown=lambda rows: rows,
) -> list[Row]:
    """Measure the rows of a table; print what `shown` makes of them; with --results-dir write {part}.csv, and
    {part}.json with what made the rows, the load, and all samples. Returns the rows."""
    before, start = os.getloadavg(), time.perf_counter()
    rows = measure()
    load, seconds = {"before": before, "after": os.getloadavg()}, round(time.perf_counter() - start)
    show(
        f"{title} ({seconds} s; load average {before[0]:.1f} before, {load['after'][0]:.1f} after)",
        shown(rows),
    )
    if args.results_dir:
        content = {"provenance": made_by | {"load_average": load, "seconds": seconds}}
        if any(isinstance(value, list) for row in rows for value in row.values()):
            content["rows"] = rows  # without samples the csv file has them all
        write(args, f"{part}.csv", as_csv(rows))
        write(args, f"{part}.json", json.dumps(content, indent=1) + "\n")
    return rows


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


def as_csv(rows: list[Row]) -> str:
    """One line a row: samples as their median, with columns _min and _max; numbers in six digits."""
    lines = []
    for row in rows:
        lines.append({})
        for name, value in row.items():
            samples = value if isinstance(value, list) else None
            lines[-1][name] = statistics.median(samples) if samples else value
            lines[-1] |= {f"{name}_min": min(samples), f"{name}_max": max(samples)} if samples else {}
    return pd.DataFrame(lines).to_csv(index=False, float_format="%.6g")


def write(args: Args, name: str, content: str | bytes) -> None:
    """Write or replace a file of the results folder: after a crash the old or the new one is there."""
    new = args.results_dir / f"{name}.new"
    with writing(args):
        try:
            new.write_bytes(content if isinstance(content, bytes) else content.encode())
            os.replace(new, args.results_dir / name)
        finally:
            new.unlink(missing_ok=True)
