"""Benchmarks: launch a suite, collect its runs, draw its figures, write the report; tune a suite's methods.

python -m benchmark run SUITE        launch what has not finished (--dry-run prints the jobs)
python -m benchmark collect SUITE    run folders -> benchmark/results/SUITE/curves.csv and runs.json
python -m benchmark plot SUITE       those -> figures beside them
python -m benchmark report           those of every suite -> docs/results.md
python -m benchmark tune SUITE       search arguments as the suite says, on seeds that it does not report
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from benchmark import launch, slurm
from benchmark.slurm import SlurmOptions
from benchmark.suites import (
    RESULTS,
    ROOT,
    SCRATCH,
    SUITES,
    BadSuite,
    Suite,
    check_jobs,
    known_suites,
    load_suite,
)

Name = tyro.conf.Positional[str]


class Launching(SlurmOptions):
    """How jobs are launched."""

    suite: Name
    """name of a suite in benchmark/suites, or the path of a .toml file"""
    run_dir: Path = ROOT / "runs" / "benchmark"
    """the job folders are created in {run_dir}/{suite}"""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """runs at a time on this machine, in [1, 1024]; the cores are dealt out to them"""
    track: bool = False
    """log every run to Weights and Biases as well, in a group of the suite's name"""
    dry_run: bool = False
    """print the jobs and where they stand, start nothing; imports the modules that environments name"""
    engine: Literal["local", "slurm"] = "local"
    """local: processes on this machine; slurm: one array job (docs/cluster.md)"""

    def launch(self, suite: Suite, run_dir: Path) -> int:
        """Launch the jobs of a suite, or print them; the exit status."""
        if self.dry_run:
            for job in suite.jobs():
                status = launch.job_status(run_dir / suite.name / job.name)
                print(f"{status:11} {job.name}: {shlex.join(['python', *job.command])}")
            print(f"{len(suite.jobs())} jobs")
            return 0
        if self.engine == "local":
            return launch.run_local(suite, run_dir, self.workers, self.track)
        return slurm.run_slurm(suite, run_dir, self, self.track)


class Run(Launching):
    """Launch the jobs of a suite that have not finished; interrupted ones go on from their checkpoints."""

    methods: tuple[str, ...] = ()
    """only these methods; default: all of the suite"""
    environments: tuple[str, ...] = ()
    """only these environments"""
    seeds: tuple[int, ...] = ()
    """only these seeds"""

    def __call__(self) -> int:
        suite = load_suite(self.suite).only(self.methods, self.environments, self.seeds)
        return self.launch(suite, self.run_dir)


class Tune(Launching):
    """Search arguments as the suite's table `tune` says; launch, collect, judge and print the winners."""

    results: Path | None = None
    """trials.csv goes to {results}/tune/{suite}; default: as of `collect`"""
    allow_mixed: bool = False
    """as of `collect`"""

    def __call__(self) -> int:
        from benchmark import tune

        suite = load_suite(self.suite)
        if suite.tune is None:
            raise BadSuite(
                f"{suite.path.name}: tune: this key is missing; docs/benchmark.md says what it may hold"
            )
        trials = tune.trials_of(suite)
        everything = tune.as_suite(suite, trials, dict.fromkeys(trials, suite.tune.seeds))
        try:
            check_jobs(everything)
        except ValueError as error:
            raise BadSuite(f"{suite.path.name}: tune.space: {error}") from None
        if self.dry_run:
            return self.launch(everything, self.run_dir / "tune")
        return tune.search(
            suite, self.run_dir, results_of(suite, self.results), self.launch, self.allow_mixed
        )


@dataclass
class Collect:
    """Turn the finished runs of a suite into curves.csv and runs.json; name the missing and the failed ones."""

    suite: Name
    """name of a suite in benchmark/suites, or the path of a .toml file"""
    run_dir: Path = ROOT / "runs" / "benchmark"
    """where `run` put the job folders"""
    results: Path | None = None
    """they go to {results}/{suite}; default: benchmark/results, of suites elsewhere runs/results"""
    allow_mixed: bool = False
    """take runs of several commits, of uncommitted code or of other arguments together; the report says so"""

    def __call__(self) -> int:
        from benchmark.collect import collect

        suite = load_suite(self.suite, check=False)
        folder = results_of(suite, self.results) / suite.name
        content = collect(suite, self.run_dir, folder, self.allow_mixed)
        print(f"{len(content.runs)} runs in {folder}")
        for word in ("missing", "failed"):
            if getattr(content, word):
                print(f"{word}: {', '.join(getattr(content, word))}")
        return 0


@dataclass
class Plot:
    """Draw the figures of a suite from its curves.csv and runs.json."""

    suite: Name
    """name of a suite in benchmark/suites, or the path of a .toml file"""
    results: Path | None = None
    """the figures go beside them in {results}/{suite}; default: as of `collect`"""

    def __call__(self) -> int:
        from benchmark.data import own_runs
        from benchmark.figures import plot

        suite = load_suite(self.suite, check=False)
        results = results_of(suite, self.results)
        if own_runs(suite, results / suite.name) is None:
            raise BadSuite(f"{results / suite.name} has no runs.json; collect the suite first")
        for path in plot(suite, results):
            print(path)
        return 0


@dataclass
class Report:
    """Write docs/results.md from the results of every suite that has some."""

    results: Path = RESULTS
    """where the suites' folders are"""
    output: Path = ROOT / "docs" / "results.md"
    """the file to write"""

    def __call__(self) -> int:
        from benchmark.report import report

        suites = [load_suite(name, check=False) for name in known_suites()]
        suites = [
            each for each in suites if (self.results / each.name / "runs.json").exists() and not each.scratch
        ]
        if not suites:
            raise BadSuite(f"--results {self.results} has no results of any suite")
        if not self.output.parent.is_dir():
            raise BadSuite(f"--output {self.output}: there is no folder {self.output.parent}")
        report(suites, self.results, self.output)
        print(self.output)
        return 0


def results_of(suite: Suite, results: Path | None) -> Path:
    """The folder that was asked for; else this repository's, for its own suites but those of scratch."""
    ours = suite.path.resolve().parent == SUITES.resolve() and not suite.scratch
    return results or (RESULTS if ours else SCRATCH)


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Collect, tyro.conf.subcommand("collect")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit status, 2 for bad input."""
    try:
        return tyro.cli(Command, args=argv, prog="python -m benchmark", description=__doc__)()
    except (
        BadSuite,
        OSError,
    ) as error:  # of the operating system: a folder that cannot be written, a full disk
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
