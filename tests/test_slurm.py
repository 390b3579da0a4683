"""benchmark/slurm.py on a real Slurm of one node, which tests/slurm_node.sh installs and starts where root has apt."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPO, read_csv

from benchmark import __main__ as command_line
from benchmark import launch, slurm
from benchmark.slurm import SlurmOptions
from benchmark.suites import BadSuite, load_suite

pytestmark = pytest.mark.xdist_group("slurm")  # one process installs it, whatever pytest's --dist is
NODE_SCRIPT = REPO / "tests" / "slurm_node.sh"
OPTIONS = SlurmOptions(slurm_partition="test", slurm_time=30, slurm_memory="1GB")
BATCH, ITERATIONS = 8 * 64, 60
# `rare` checkpoints only when it is told to stop, so it can go on only if the signals reach it as they should.
SUITE = f"""
description = "one job to requeue, one that comes near its time limit, one to kill, one that fails"
environments = ["Hopper-v4"]
seeds = [1]

[arguments]
num-steps = 64
total-timesteps = {BATCH * ITERATIONS}

[methods.rare]
label = "rare"
script = "ppo_continuous.py"
seeds = [1, 2]
arguments = {{ checkpoint-every = 1000 }}

[methods.often]
label = "often"
script = "ppo_continuous.py"
arguments = {{ checkpoint-every = 1 }}

[methods.broken]
label = "broken"
script = "ppo_continuous.py"
environments = ["NoSuchTask-v0"]
"""
REQUEUED, TIMED_OUT = "Hopper-v4__rare__1", "Hopper-v4__rare__2"
KILLED, BROKEN = "Hopper-v4__often__1", "NoSuchTask-v0__broken__1"
CLUSTER = pytest.mark.skipif(
    not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get")),
    reason="installs and starts Slurm, which needs root and apt",
)


# ---- Without Slurm ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"time": 0}, "--slurm-time: Input should be greater than 0"),
        ({"cpus": -1}, "--slurm-cpus: Input should be greater than 0"),
        ({"gpus": -1}, "--slurm-gpus: Input should be greater than or equal to 0"),
        ({"parallelism": 0}, "--slurm-parallelism: Input should be greater than 0"),
        ({"pack": 0}, "--slurm-pack: Input should be greater than 0"),
        ({"memory": "0GB"}, "--slurm-memory: String should match pattern '^[1-9][0-9]*[KMGT]B?$'"),
        ({"extra": {"time": "10"}}, "--slurm-extra time: use --slurm-time"),
        ({"extra": {"cpus_per_task": "2"}}, "--slurm-extra cpus_per_task: use --slurm-cpus"),
        ({"extra": {"array": "0-3"}}, "--slurm-extra array: the launcher sets it itself; leave it out"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(BadSuite) as error:
        SlurmOptions(**{f"slurm_{name}": value for name, value in options.items()})
    assert str(error.value) == sentence


def test_bad_options_on_the_command_line(capsys):
    assert command_line.main(["run", "smoke", "--engine", "slurm", "--slurm-time", "0"]) == 2
    assert capsys.readouterr().err == "error: --slurm-time: Input should be greater than 0\n"


@pytest.mark.parametrize(("workers", "pack", "parallelism"), [(None, 4, 8), (1, 1, 1), (4, 4, 1), (10, 4, 2), (100, 4, 8)])
def test_a_suite_bounds_how_many_runs_there_are_at_a_time(suite, workers, pack, parallelism):
    options = SlurmOptions(slurm_pack=4, slurm_parallelism=8).for_suite(suite.suite.model_copy(update={"workers": workers}))
    assert (options.slurm_pack, options.slurm_parallelism) == (pack, parallelism)


@pytest.mark.full
def test_several_runs_share_a_job(suite, tmp_path):
    """What a node runs, here without Slurm: two runs side by side, on cores of their own, one that fails and is named."""
    folders = [folder for folder in launch.prepare(suite.suite, tmp_path) if folder.name in (KILLED, REQUEUED, BROKEN)]
    cores, before = launch.split_cores(len(folders)), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError, match=f"^{BROKEN}: exit status 2; see log.txt in "):
            slurm.SlurmJob(folders)()
    finally:
        signal.signal(signal.SIGTERM, before)
    starts, ends = zip(*((attempts(folder)[0]["start"], attempts(folder)[0]["end"]) for folder in folders))
    assert max(starts) < max(ends) and [attempts(folder)[0]["cores"] for folder in folders] == cores
    assert {folder.name: launch.job_status(folder) for folder in folders}[BROKEN] == "failed"
    assert all(launch.job_status(folder) == "finished" for folder in folders if folder.name != BROKEN)


def test_a_machine_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadSuite, match="there is no sbatch here; run it where Slurm is, or use --engine local"):
        slurm.submit([tmp_path / "job"], OPTIONS)
    assert not list(tmp_path.iterdir())


def test_a_slurm_that_does_not_answer(tmp_path, monkeypatch):
    for program in ("sbatch", "srun", "squeue", "sinfo"):
        (tmp_path / program).write_text("#!/bin/sh\necho Unable to contact slurm controller >&2\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadSuite, match="Slurm does not answer: Unable to contact slurm controller"):
        slurm.submit([tmp_path / "job"], OPTIONS)
    assert slurm.queue() is None


# ---- With Slurm ------------------------------------------------------------------------------------------------
def node(*words) -> str:
    """Call tests/slurm_node.sh, which must succeed; what it prints."""
    done = subprocess.run([NODE_SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def alive(number: int) -> bool:
    """Whether that process runs; one that has ended has no command line, even if nobody has waited for it yet."""
    try:
        return bool(Path(f"/proc/{number}/cmdline").read_bytes())
    except OSError:
        return False


def daemons(folder: Path) -> dict[str, int]:
    """Process ids of the node's daemons that are alive."""
    ids = {path.stem: int(path.read_text()) for path in folder.glob("*.pid")}
    return {name: number for name, number in ids.items() if alive(number)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A running Slurm; every program started from here uses it."""
    folder = tmp_path_factory.mktemp("node")
    node("install")
    with pytest.MonkeyPatch.context() as patch:
        printed = node("start", folder)
        patch.setenv("SLURM_CONF", printed.strip().removeprefix("export SLURM_CONF="))
        patch.setattr(slurm, "POLL_S", 0.5)
        patch.setattr(slurm, "SETTLE_S", 1)
        try:
            yield folder
        finally:
            node("stop", folder)
    assert not daemons(folder)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """The suite above, and an empty folder for its runs."""
    path = tmp_path_factory.mktemp("suite") / "small.toml"
    path.write_text(SUITE)
    return SimpleNamespace(suite=load_suite(str(path), check=False), run_dir=path.parent / "runs")


def until(found, what: str, seconds: float = 180):
    """What `found()` returns once that is true."""
    limit = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < limit, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return result


def steps(folder: Path) -> list[int]:
    """The steps of metrics.csv of the one run of a job; none before it has a run."""
    runs = launch.run_folders(folder)
    if not runs or not (runs[0] / "metrics.csv").exists():
        return []
    lines = (runs[0] / "metrics.csv").read_text().splitlines()[1:]
    return [int(line.split(",")[0]) for line in lines]


def slurm_id(folder: Path) -> str:
    """Slurm's number of a job."""
    return json.loads((folder / "slurm.json").read_text())["job"]


def attempts(folder: Path) -> list[dict]:
    """The attempts at a job."""
    return json.loads((folder / "job.json").read_text())["attempts"]


def kill_at_once(folder: Path) -> None:
    """SIGKILL to the training script of a job and to the process of submitit that waits for it."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        if "--run-dir" in words and str(folder) in words:
            os.kill(parent, signal.SIGKILL)
            os.kill(int(path.name), signal.SIGKILL)
            return
    raise AssertionError(f"no process trains in {folder}")


@CLUSTER
@pytest.mark.full
def test_bad_input_is_refused_by_the_cluster(cluster, suite):
    folders = launch.prepare(suite.suite, suite.run_dir)
    with pytest.raises(BadSuite, match="there is no partition 'tets'; the nearest are test"):
        slurm.submit(folders, SlurmOptions(slurm_partition="tets"))
    with pytest.raises(BadSuite, match="sbatch refuses the jobs: .*Invalid generic resource"):
        slurm.submit(folders, SlurmOptions(slurm_partition="test", slurm_gpus=1))  # the node has none
    assert slurm.queue() == {}
    assert not (suite.run_dir / "small" / "slurm").exists() or not list((suite.run_dir / "small" / "slurm").iterdir())


@CLUSTER
@pytest.mark.full
def test_a_suite_is_requeued_resumed_and_retried(cluster, suite):
    folders = {folder.name: folder.resolve() for folder in launch.prepare(suite.suite, suite.run_dir)}
    lines, status = [], []

    def launch_suite():
        status.append(slurm.run_slurm(suite.suite, suite.run_dir, OPTIONS, say=lines.append))

    threading.Thread(target=launch_suite, daemon=True).start()
    pokes = {
        REQUEUED: lambda folder: subprocess.run(["scontrol", "requeue", slurm_id(folder)], check=True),
        # What Slurm does ahead of the time limit (sbatch --signal=USR2@90).
        TIMED_OUT: lambda folder: subprocess.run(["scancel", "--signal=USR2", slurm_id(folder)], check=True),
        KILLED: kill_at_once,
    }
    while pokes:
        name = until(lambda: next((name for name in pokes if len(steps(folders[name])) >= 3), None), f"{list(pokes)} to train")
        pokes.pop(name)(folders[name])
    until(lambda: any(line.startswith("STOPPED") for line in lines), "the killed job to be listed")
    assert launch.job_status(folders[KILLED]) == "interrupted"
    assert "exit_code" not in attempts(folders[KILLED])[0]

    # A second launcher beside the first: what was killed goes on, what is in the queue is not submitted again.
    before = {name: slurm_id(folders[name]) for name in (REQUEUED, TIMED_OUT, KILLED)}
    todo = [folders[name] for name in before]
    jobs = slurm.submit(todo, OPTIONS)
    assert [name for name in before if slurm_id(folders[name]) != before[name]] == [KILLED]
    assert all(job.job_id == slurm_id(folder) for folder, job in jobs.items()) and folders[KILLED] in jobs
    assert slurm.wait(jobs, OPTIONS, lambda line: None) == {}
    until(lambda: status, "the first launcher to end")

    assert status == [1]
    assert {line.split(":")[1].strip() for line in lines if line.startswith("not finished")} == {KILLED, BROKEN}
    assert [each["exit_code"] for each in attempts(folders[BROKEN])] == [2, 2]
    assert launch.job_status(folders[BROKEN]) == "failed"
    for name in (REQUEUED, TIMED_OUT):
        first, second = attempts(folders[name])
        # 143: on a busy machine Slurm kills what runs the script before it has seen its end; then the run folder tells.
        assert (first["exit_code"] == 130 or (first["exit_code"] == 143 and first["recorded"])) and second["exit_code"] == 0
    for folder in todo:
        check_resumed(folder)
    assert slurm.submit(todo, OPTIONS) == {} == slurm.queue()


def check_resumed(folder: Path) -> None:
    """A job was stopped once and then went on in the same run folder, with every step there once."""
    assert launch.job_status(folder) == "finished"
    assert [each["resumed"] for each in attempts(folder)] == [False, True]
    (run,) = launch.run_folders(folder)
    assert json.loads((run / "result.json").read_text())["status"] == "finished"
    assert steps(folder) == [BATCH * iteration for iteration in range(1, ITERATIONS + 1)]
    episodes = [(int(row["global_step"]), int(row["env_index"])) for row in read_csv(run / "episodes.csv")]
    assert episodes and [step for step, _ in episodes] == sorted(step for step, _ in episodes)
    assert len(set(episodes)) == len(episodes)


@CLUSTER
@pytest.mark.full
def test_the_node_survives_a_crash(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    first = node("start", folder)
    before = daemons(folder)
    assert sorted(before) == ["munged", "slurmctld", "slurmd"]
    assert node("start", folder) == first and daemons(folder) == before
    for number in before.values():
        os.kill(number, signal.SIGKILL)
    until(lambda: not daemons(folder), "the daemons to end", 10)
    node("start", folder)
    after = daemons(folder)
    assert sorted(after) == sorted(before) and not set(after.values()) & set(before.values())
    node("stop", folder)
    node("stop", folder)
    assert not any(map(alive, after.values()))
    assert sorted(daemons(cluster)) == ["munged", "slurmctld", "slurmd"]  # those of the other node
