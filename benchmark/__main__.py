"""Benchmarks: launch a suite, collect its runs, draw its figures, write the report.

    python -m benchmark run SUITE        launch what has not finished (--dry-run prints the jobs)
    python -m benchmark collect SUITE    run folders -> benchmark/results/SUITE/*.csv
    python -m benchmark plot SUITE       those csv files -> figures beside them
    python -m benchmark report           those of every suite -> docs/results.md
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmark.suites import RESULTS, ROOT, BadSuite, known_suites, load_suite


@dataclass
class Run:
    """Launch the jobs of a suite that have not finished; interrupted ones go on from their checkpoints."""

    suite: tyro.conf.Positional[str]
    """name of a suite in benchmark/suites, or the path of a .toml file"""
    run_dir: Path = ROOT / "runs" / "benchmark"
    """the job folders are created in {run_dir}/{suite}"""
    workers: int = 1
    """runs at a time on this machine, in [1, 1024]; the cores are dealt out to them"""
    methods: tuple[str, ...] = ()
    """only these methods; default: all of the suite"""
    environments: tuple[str, ...] = ()
    """only these environments"""
    seeds: tuple[int, ...] = ()
    """only these seeds"""
    dry_run: bool = False
    """print the jobs and where they stand, start nothing"""
    engine: Literal["local", "slurm"] = "local"
    """local: processes on this machine; slurm: one array job (docs/cluster.md)"""
    slurm_partition: str | None = None
    """partition of the array job; default: the cluster's"""
    slurm_time: int = 240
    """minutes after which Slurm stops a job, which then goes on in a new one, in [1, inf)"""
    slurm_cpus: int = 1
    """cores of a job, in [1, inf)"""
    slurm_gpus: int = 0
    """GPUs of a job, in [0, inf)"""
    slurm_memory: str = "4GB"
    """memory of a job"""
    slurm_parallelism: int = 64
    """jobs of the array at a time, in [1, inf)"""
    slurm_extra: dict[str, str] = field(default_factory=dict)
    """further options of sbatch, as KEY VALUE pairs: account my_account qos high"""

    def __call__(self) -> int:
        suite = load_suite(self.suite).only(self.methods, self.environments, self.seeds)
        if not 1 <= self.workers <= 1024:
            raise BadSuite(f"--workers is {self.workers}, it must be in [1, 1024]")
        from benchmark import launch

        if self.dry_run:
            for job in suite.jobs():
                status = launch.job_status(self.run_dir / suite.name / job.name)
                print(f"{status:11} {job.name}: {shlex.join(['python', *job.command])}")
            print(f"{len(suite.jobs())} jobs")
            return 0
        if suite.unready:
            raise BadSuite(f"{suite.path.name}: nothing of it may be launched yet: {suite.unready}; then remove the key unready")
        if self.engine == "local":
            return launch.run_local(suite, self.run_dir, self.workers)
        from benchmark import slurm

        options = slurm.SlurmOptions(
            partition=self.slurm_partition,
            time=self.slurm_time,
            cpus=self.slurm_cpus,
            gpus=self.slurm_gpus,
            memory=self.slurm_memory,
            parallelism=self.slurm_parallelism,
            extra=self.slurm_extra,
        )
        return slurm.run_slurm(suite, self.run_dir, options)


@dataclass
class Collect:
    """Turn the finished runs of a suite into the csv files of benchmark/results; name those that are missing or failed.

    Figures of earlier csv files are removed; `plot` draws them anew.
    """

    suite: tyro.conf.Positional[str]
    """name of a suite in benchmark/suites, or the path of a .toml file"""
    run_dir: Path = ROOT / "runs" / "benchmark"
    """where `run` put the job folders"""
    results: Path = RESULTS
    """the csv files go to {results}/{suite}"""
    allow_mixed: bool = False
    """take runs of several commits, of uncommitted code or of other arguments together; the report will say so"""

    def __call__(self) -> int:
        from benchmark.collect import collect

        suite = load_suite(self.suite, check=False)
        content = collect(suite, self.run_dir, self.results, self.allow_mixed)
        print(f"{len(content['runs'])} runs in {self.results / suite.name}")
        for word in ("missing", "failed"):
            if content[word]:
                print(f"{word}: {', '.join(content[word])}")
        return 0


@dataclass
class Plot:
    """Draw the figures of a suite from its csv files."""

    suite: tyro.conf.Positional[str]
    """name of a suite in benchmark/suites, or the path of a .toml file"""
    results: Path = RESULTS
    """the figures go beside the csv files in {results}/{suite}"""

    def __call__(self) -> int:
        from benchmark.figures import plot

        for path in plot(load_suite(self.suite, check=False), self.results):
            print(path)
        return 0


@dataclass
class Report:
    """Write docs/results.md from the csv files of every suite that has some."""

    results: Path = RESULTS
    """where the csv files are"""
    output: Path = ROOT / "docs" / "results.md"
    """the file to write"""

    def __call__(self) -> int:
        from benchmark.report import report

        suites = [load_suite(name, check=False) for name in known_suites()]
        report([suite for suite in suites if (self.results / suite.name / "runs.json").exists()], self.results, self.output)
        print(self.output)
        return 0


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Collect, tyro.conf.subcommand("collect")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit status, 2 for bad input."""
    command = tyro.cli(Command, args=argv, prog="python -m benchmark", description=__doc__)
    try:
        return command()
    except BadSuite as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
