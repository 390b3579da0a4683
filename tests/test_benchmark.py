"""benchmark/: suite files, the local launcher through kills and failures, what collect makes of run folders, tuning."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
from conftest import REPO, environment, read_csv, wait_for

from benchmark import __main__ as command_line
from benchmark import data, launch, suites, tune
from benchmark.collect import blob, collect, describe, diverged
from benchmark.suites import BadSuite, known_suites, load_suite, without

SUITE = """
description = "tiny runs"
environments = ["toy_envs:Walk-v0"]
seeds = [1, 2]
grid = 256
diagnostics = ["bilevel/cosine"]
baselines = ["ppo"]

[arguments]
num-envs = 2
num-steps = 32
total-timesteps = 1024
num-minibatches = 2
update-epochs = 1
checkpoint-every = 2
device = "cpu"

[methods.ppo]
label = "PPO"
script = "ppo_continuous.py"

[methods.blpo]
label = "BLPO"
script = "blpo_continuous.py"
arguments = { cg-iterations = 8, nystrom-rank = 3 }
"""


CLAIM = """
[[claims]]
text = "BLPO above PPO"
better = "blpo"
than = "ppo"
"""


@pytest.fixture(autouse=True)
def toys(toy_envs, monkeypatch):
    """The toy tasks, here and in every child process."""
    monkeypatch.setenv("PYTHONPATH", str(REPO / "tests"))


def write(folder: Path, *changes: tuple[str, str], text: str = SUITE) -> str:
    """The suite with pieces replaced, as a file; returns its path."""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "tiny.toml"
    path.write_text(text)
    return str(path)


# ---- Suite files -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", known_suites())
def test_the_suites_are_sound_and_the_list_counts_their_runs(name):
    """docs/benchmark.md says of each suite how many runs it launches, and how many have been collected."""
    suite = load_suite(name)
    assert suite.jobs() and suite.description
    row = next(line for line in (REPO / "docs" / "benchmark.md").read_text().splitlines() if f"[`{name}`](" in line and line[0] == "|")
    _, _, _, runs, _, collected, _ = (cell.strip() for cell in row.split("|"))
    assert runs.split()[0] == str(len(suite.jobs()))
    path = REPO / "benchmark" / "results" / name / "runs.json"
    if path.exists():
        where = suite.told.removeprefix("docs/") or f"results.md#{name}"
        assert f"[{len(json.loads(path.read_text())['runs'])} runs]({where})" in collected
    else:
        assert collected in ("not yet", "-") or f"#{name})" not in collected


def test_jobs_are_every_combination_once_in_a_stable_order(tmp_path):
    suite = load_suite(write(tmp_path))
    names = [job.name for job in suite.jobs()]
    assert names == [f"toy_envs_Walk-v0__{method}__{seed}" for seed in (1, 2) for method in ("ppo", "blpo")]
    assert names == [job.name for job in load_suite(write(tmp_path)).jobs()]
    command = suite.jobs()[1].command
    assert command[:7] == ["blpo_continuous.py", "--env-id", "toy_envs:Walk-v0", "--seed", "1", "--exp-name", "blpo"]
    assert command[-4:] == ["--cg-iterations", "8", "--nystrom-rank", "3"]


def test_a_method_may_have_its_own_seeds_environments_and_arguments_by_environment(tmp_path):
    more = 'seeds = [2, 7]\nenvironments = ["toy/Clock-v0"]\n[methods.ppo.arguments-by-environment."toy/Clock-v0"]\nnorm-adv = false'
    suite = load_suite(write(tmp_path, ('script = "ppo_continuous.py"', f'script = "ppo_continuous.py"\n{more}')))
    ppo = [job for job in suite.jobs() if job.method == "ppo"]
    assert [(job.environment, job.seed) for job in ppo] == [("toy/Clock-v0", 2), ("toy/Clock-v0", 7)]
    assert all(job.command[-1] == "--no-norm-adv" for job in ppo)
    assert not any("--no-norm-adv" in job.command for job in suite.jobs() if job.method == "blpo")


def test_runs_of_another_suite_are_shown_and_not_launched(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    (tmp_path / "tiny.toml").rename(tmp_path / "source.toml")
    monkeypatch.setattr(suites, "SUITES", tmp_path)
    taken = ("[methods.blpo]", '[methods.same]\nlabel = "PPO again"\nscript = "ppo_continuous.py"\nruns-of = "source.ppo"\n\n[methods.blpo]')
    suite = load_suite(write(tmp_path, taken))
    assert [job.method for job in suite.jobs()] == ["ppo", "blpo"] * 2
    assert [job.method for job in suite.shown()] == ["ppo", "same", "blpo"] * 2
    assert command_line.main(["run", write(tmp_path, taken), "--dry-run"]) == 0 and "same" not in capsys.readouterr().out
    for changes, words in (
        ([("total-timesteps = 1024", "total-timesteps = 2048")], "runs-of takes toy_envs:Walk-v0, seed 1, from source, which launches it as: ppo_con"),
        ([("seeds = [1, 2]", "seeds = [1, 2, 3]")], "runs-of takes toy_envs:Walk-v0, seed 3, from source, which does not launch it"),
    ):
        with pytest.raises(BadSuite, match=words):
            load_suite(write(tmp_path, taken, *changes))
    source = (tmp_path / "source.toml").read_text()
    (tmp_path / "source.toml").write_text(source.replace("grid = 256", 'grid = 256\nuntimed = "busy"'))
    with pytest.raises(BadSuite, match="runs-of: the runs are untimed in source; give the method the same key untimed"):
        load_suite(write(tmp_path, taken))


def test_a_suite_or_a_method_may_be_untimed(tmp_path):
    suite = load_suite(write(tmp_path, ("grid = 256", 'grid = 256\nuntimed = "busy"'), ('label = "PPO"', 'label = "PPO"\nuntimed = "shared"')))
    assert (suite.methods["ppo"].untimed, suite.methods["blpo"].untimed) == ("shared", "busy")


def test_a_part_of_a_suite_can_be_chosen(tmp_path, capsys):
    suite = load_suite(write(tmp_path))
    assert [(job.method, job.seed) for job in suite.only(("blpo",), (), (2,)).jobs()] == [("blpo", 2)]
    assert suite.only((), ("toy_envs:Walk-v0",), ()).jobs() == suite.jobs()
    assert command_line.main(["run", write(tmp_path), "--dry-run", "--methods", "blbo"]) == 2
    assert capsys.readouterr().err == "error: --methods: tiny does not have blbo; the nearest are blpo\n"


DEAD = '[dead]\ncolumn = "losses/no"\nbelow = 1e-8\nwords = "dead actor"\n\n'
TUNE = '[tune]\nseeds = [11]\ntrials = 2\n[tune.space.ppo]\ngamma = [0.9, 0.99]\n\n'
HEAD, PPO, LABEL, GRID = "[methods.ppo]", 'script = "ppo_continuous.py"', 'label = "PPO"', "grid = 256"
BAD = [
    ([("[1, 2]", "[]")], "seeds: Tuple should have at least 1 item"),
    ([("[1, 2]", "[1, 1]")], "seeds: it holds 1 twice, which would make the same job twice"),
    ([("[1, 2]", "[-1]")], "seeds[0]: Input should be greater than or equal to 0"),
    ([("[1, 2]", "[1099511627776]")], "seeds[0]: Input should be less than 2147483648"),
    ([("[1, 2]", "[true]")], "seeds[0]: Input should be a valid integer"),
    ([("[1, 2]", '"one"')], "seeds: Input should be a valid tuple"),
    ([("seeds = [1, 2]\n", "")], "methods.ppo.seeds: this key is missing, here and in the suite"),
    ([('["toy_envs:Walk-v0"]', '["a", "a"]')], "environments: it holds 'a' twice"),
    ([('["toy_envs:Walk-v0"]', '["a/b", "a:b"]')], "environments: two of them make the same job a_b__ppo__1"),
    ([('["toy_envs:Walk-v0"]', '["Hoper-v4"]')], "'Hoper-v4' cannot be made"),
    ([('["toy_envs:Walk-v0"]', '["CartPole-v1"]')], "for discrete actions use ppo_discrete.py"),
    ([("ppo_continuous.py", "ppo_continous.py")], "methods.ppo.script: there is no script 'ppo_continous.py'; the nearest"),
    ([("nystrom-rank", "nystrom-rnk")], "methods.blpo.arguments: blpo_continuous.py cannot read"),
    ([("nystrom-rank = 3", "nystrom-rank = 0")], "--nystrom-rank is 0: Input should be greater than or equal to 1"),
    ([("nystrom-rank = 3", "nystrom-rank = [3]")], "methods.blpo.arguments.nystrom-rank: it must be a number, a text, true or false"),
    ([("total-timesteps = 1024", "total-timesteps = 63")], "--total-timesteps 63 is less than one rollout of 64"),
    ([("device", "seed = 3\ndevice")], "methods.ppo.arguments.seed: this argument is the launcher's own"),
    ([("device", "capture-video = true\ndevice")], "arguments.capture-video: toy_envs:Walk-v0 cannot be filmed here"),
    ([(GRID, "grid = 0")], "grid: Input should be greater than or equal to 1"),
    ([(GRID, "gird = 256")], "gird: this key is unknown"),
    ([(GRID, 'grid = 256\nname = "other"')], "name, path: these keys are unknown"),
    ([(LABEL, 'label = "PPO"\nname = "other"')], "methods.ppo.name: this key is unknown"),
    ([('label = "PPO"\n', "")], "methods.ppo.label: this key is missing"),
    ([('baselines = ["ppo"]', 'baselines = ["sac"]')], "baselines names 'sac', which is no method of the suite; there are blpo, ppo"),
    ([(GRID, 'grid = 256\nfigures = ["sac"]')], "figures names 'sac', which is no method of the suite"),
    ([(GRID, 'grid = 256\nheadline = "yes"')], "headline: Input should be a valid boolean"),
    ([(HEAD, DEAD + HEAD)], "dead.column names 'losses/no', which is no diagnostic of the suite"),
    ([(LABEL, 'label = "PPO"\nruns-of = "smoke"')], "methods.ppo.runs-of: 'smoke' names no suite and method"),
    ([(LABEL, 'label = "PPO"\nruns-of = "smok.ppo"')], "runs-of: there is no suite 'smok'; the nearest are smoke"),
    ([(LABEL, 'label = "PPO"\nruns-of = "smoke.pppo"')], "runs-of: smoke has no method 'pppo'; the nearest are ppo"),
    ([(LABEL, 'label = "PPO"\nruns-of = "smoke.ppo"')], "runs-of: the grid is 1000 in smoke, 256 here; make them equal"),
    ([(HEAD, "[methods.P_P_O]")], "methods.P_P_O.[key]: String should match pattern"),
    ([(LABEL, 'label = "PPO"\narguments-by-environment.No = {}')], "arguments-by-environment names 'No', which is no environment"),
    ([("[arguments]", "[arguments")], "Expected ']' at the end of a table declaration"),
    ([(SUITE, SUITE + CLAIM)], "claims[0]: reference.json has no levels of toy_envs:Walk-v0"),
    ([(SUITE, SUITE + CLAIM + 'measure = "best"\n')], "claims[0].measure: Input should be 'return', 'above' or 'time'"),
    ([(SUITE, SUITE + CLAIM + 'over = "all"\n')], "claims[0].over: Input should be 'end', 'training' or 'evaluation'"),
    ([(SUITE, SUITE + CLAIM + 'over = "evaluation"\n')], "claims[0].over names 'charts/eval_return', which is no diagnostic"),
    ([(SUITE, SUITE + CLAIM.replace('"ppo"', '"sac"'))], "claims[0].than names 'sac', which is no method of the suite"),
    ([(HEAD, TUNE.replace("[11]", "[2]") + HEAD)], "tune.seeds holds 2, a seed of the suite; tune on seeds that it does not report"),
    ([(HEAD, TUNE.replace("space.ppo", "space.sac") + HEAD)], "tune.space names 'sac', which is no method"),
    ([(HEAD, TUNE.replace("[0.9, 0.99]", "{ low = 1, high = 1 }") + HEAD)], "tune.space.ppo.gamma: low must be less than high"),
    ([(HEAD, TUNE.replace("[0.9, 0.99]", "[[1]]") + HEAD)], "tune.space.ppo.gamma"),
    ([("ppo_continuous.py", "stackelberg_toy.py")], "methods.ppo.script: stackelberg_toy.py trains on no environment"),
    ([(HEAD, TUNE + HEAD)], "tune: reference.json has no levels of toy_envs:Walk-v0"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_a_bad_suite_is_one_sentence_and_creates_nothing(tmp_path, capsys, changes, words):
    path = write(tmp_path, *changes)
    status = command_line.main(["run", path, "--run-dir", str(tmp_path / "runs")])
    said = capsys.readouterr().err
    assert status == 2 and said.startswith("error: tiny.toml: ") and words in said, said
    assert said.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_an_unknown_suite_names_the_nearest(capsys):
    assert command_line.main(["run", "smok"]) == 2
    assert capsys.readouterr().err == "error: there is no suite 'smok'; the nearest are smoke\n"


@pytest.mark.parametrize("name", ["...toml", "a b.toml", "missing.toml"])
def test_a_suite_file_of_a_name_that_is_none(tmp_path, capsys, name):
    """Not to be taken for the folder above."""
    if name != "missing.toml":
        (tmp_path / name).write_text(SUITE)
    for command in ("run", "collect", "plot", "tune"):
        assert command_line.main([command, str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {name}: name: String should match" if name != "missing.toml" else "error: the suite"), said


def test_dry_run_prints_the_jobs_and_creates_nothing(tmp_path, capsys):
    words = ["run", write(tmp_path), "--run-dir", str(tmp_path / "runs"), "--dry-run"]
    assert command_line.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1] == "4 jobs" and not (tmp_path / "runs").exists()
    assert lines[0].startswith("waiting     toy_envs_Walk-v0__ppo__1: python ppo_continuous.py --env-id toy_envs:Walk-v0 --seed 1")


# ---- The launcher ----------------------------------------------------------------------------------------------
# What the launcher needs of a script, without PyTorch: a run folder with a row each 64 steps and a checkpoint each 128.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

words, given, stopped = sys.argv[1:], {}, []
while words:
    name = words.pop(0).removeprefix("--").replace("-", "_")
    given[name] = words.pop(0) if words and not words[0].startswith("--") else not name.startswith("no_")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stopped.append(number))
resume, given["total_timesteps"] = given.pop("resume", None), int(given["total_timesteps"])
run = Path(resume or Path(given["run_dir"]) / f"run{time.time_ns()}")
run.mkdir(exist_ok=True)
step = int((run / "checkpoint.pt").read_text()) if resume else 0
made = {"args": given, "commit": "ab" * 20, "versions": {"torch": "2"}, "cpu": "a processor"}
(run / "args.json").write_text(json.dumps(made))
blpo = "blpo" in sys.argv[0]
tables = {}
for name, head in (("metrics", "global_step,wall_time_s,losses/policy_loss,losses/value_loss"), ("episodes", "global_step,episodic_return")):
    head += ",bilevel/cosine" if blpo and name == "metrics" else ""
    old = (run / f"{name}.csv").read_text().splitlines()[1:] if resume else []
    tables[name] = open(run / f"{name}.csv", "w")
    print(head, *(line for line in old if int(line.split(",")[0]) <= step), sep="\\n", file=tables[name], flush=True)


def end(status, code):
    value = None if status == "diverged" else 5.0
    result = {"status": status, "global_step": step, "wall_time_s": step / 1000, "final_return": value}
    (run / "result.json").write_text(json.dumps(result))
    print(f"{status} at step {step:,}")
    sys.exit(code)


while step < given["total_timesteps"]:
    step += 64
    cosine = f",{0.5 + step % 7 / 100:.3f}" if blpo else ""
    print(f"{step},{step / 1000},0.1,0.2{cosine}", file=tables["metrics"], flush=True)
    print(f"{step - 30},{step % 11}", f"{step},{step % 5}", sep="\\n", file=tables["episodes"], flush=True)
    if step % 128 == 0 or stopped:
        (run / "new").write_text(str(step))
        os.replace(run / "new", run / "checkpoint.pt")
    if stopped:
        end("interrupted", 128 + stopped[0])
    if "Broken" in given["env_id"] and step > 100:
        raise RuntimeError("the hundredth step breaks")
    if "Exploding" in given["env_id"] and step > 300:
        end("diverged", 1)
    time.sleep(float(os.environ.get("PAUSE", 0)))
end("finished", 0)
"""
COMMIT = "ab" * 20
MADE = {"commit": COMMIT, "dirty": False, "versions": {"torch": "2"}, "cpu": "a processor", "gpu": None}
# The launcher in a process of its own, to be stopped and killed.
LAUNCHER = f"""
import sys
from pathlib import Path
from benchmark import launch
from benchmark.suites import load_suite
launch.ROOT, launch.provenance = Path(sys.argv[1]).parent / "root", lambda: {MADE}
sys.exit(launch.run_local(load_suite(sys.argv[1], check=False), Path(sys.argv[2]), 2))
"""


def pretend(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Launch SCRIPT in place of the repository's scripts."""
    (folder / "root").mkdir()
    for name in ("ppo_continuous.py", "blpo_continuous.py"):
        (folder / "root" / name).write_text(SCRIPT)
    patch.setattr(launch, "ROOT", folder / "root")
    patch.setattr(launch, "provenance", lambda: dict(MADE))
    patch.setenv("CUDA_VISIBLE_DEVICES", "0")


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Launch SCRIPT in this test."""
    pretend(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The tiny suite, run to its end with two workers: (path of the suite, run_dir, exit status). Read only."""
    folder = tmp_path_factory.mktemp("launched")
    with pytest.MonkeyPatch.context() as patch:
        pretend(folder, patch)
        suite = load_suite(write(folder), check=False)
        return str(suite.path), folder / "runs", launch.run_local(suite, folder / "runs", 2)


@pytest.mark.full
def test_the_scripts_themselves_are_launched_collected_and_reported(tmp_path):
    path, run_dir = write(tmp_path), tmp_path / "runs"
    assert command_line.main(["run", path, "--run-dir", str(run_dir), "--workers", "2"]) == 0
    words = ["--run-dir", str(run_dir), "--results", str(tmp_path / "results"), "--allow-mixed"]
    assert command_line.main(["collect", path, *words]) == 0
    loaded = data.load_results(load_suite(path, check=False), tmp_path / "results")
    assert len(loaded.runs) == 4 and (loaded.runs["steps"] == 1024).all() and (loaded.runs["wall_time_s"] > 0).all()
    assert all(run["torch"] for run in loaded.runs["versions"]) and loaded.runs["commit"].notna().all()
    for job in load_suite(path, check=False).jobs():
        (run,) = launch.run_folders(run_dir / "tiny" / job.name)
        mine = loaded.curves_of(job.method, job.environment, "episodes")[job.seed]
        assert mine.index.tolist() == [256, 512, 768, 1024] and mine.sum() == len(read_csv(run / "episodes.csv"))


def snapshot(folder: Path) -> dict[str, int]:
    """When every file below was last changed."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_job_has_a_folder_a_log_and_a_record(launched):
    path, run_dir, status = launched
    assert status == 0
    jobs = load_suite(path).jobs()
    assert sorted(each.name for each in (run_dir / "tiny").glob("[!.]*")) == sorted(job.name for job in jobs)
    for job in jobs:
        folder = run_dir / "tiny" / job.name
        assert "finished at step 1,024" in (folder / "log.txt").read_text()
        made = json.loads((folder / "job.json").read_text())
        assert made["command"] == job.command and len(made["attempts"]) == 1
        attempt = made["attempts"][0]
        assert attempt["exit_code"] == 0 and attempt["commit"] == COMMIT and attempt["host"] == os.uname().nodename
        assert launch.job_status(folder) == "finished" and len(launch.run_folders(folder)) == 1


def test_workers_get_cores_of_their_own():
    cores = sorted(os.sched_getaffinity(0))
    assert sum(launch.split_cores(1), []) == cores
    shares = launch.split_cores(len(cores))
    assert shares == [[core] for core in cores]
    assert [len(share) for share in launch.split_cores(len(cores) + 3)] == [1] * (len(cores) + 3)


def test_what_has_finished_is_not_touched_again(launched):
    path, run_dir, _ = launched
    before = snapshot(run_dir)
    assert launch.run_local(load_suite(path, check=False), run_dir, 1) == 0
    assert snapshot(run_dir) == before


def test_a_folder_of_other_arguments_is_not_overwritten(launched, tmp_path):
    changed = write(tmp_path, ("update-epochs = 1", "update-epochs = 2"))
    before = snapshot(launched[1])
    with pytest.raises(BadSuite, match="tiny.toml: methods.ppo: .*__ppo__1 is a job of other arguments"):
        launch.prepare(load_suite(changed, check=False), launched[1])
    assert snapshot(launched[1]) == before


LONG = [("[1, 2]", "[1]"), ("total-timesteps = 1024", "total-timesteps = 12800")]


def start_launcher(path: str, run_dir: Path) -> subprocess.Popen:
    """A launcher of two workers in a process of its own; its scripts take four seconds and more."""
    words = [sys.executable, "-c", LAUNCHER, path, str(run_dir)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, cwd=REPO, env=environment(PAUSE="0.02"), text=True, **pipes)


def checkpoints(run_dir: Path) -> list[Path]:
    return list(run_dir.glob("tiny/*/*/checkpoint.pt"))


def assert_complete(path: str, run_dir: Path, resumed: bool) -> None:
    """Every job has finished in one run folder whose csv files have every step once."""
    for job in load_suite(path, check=False).jobs():
        folder = run_dir / "tiny" / job.name
        (run,) = launch.run_folders(folder)
        steps = [int(row["global_step"]) for row in read_csv(run / "metrics.csv")]
        assert steps == list(range(64, 12801, 64))
        assert launch.job_status(folder) == "finished"
        assert any(attempt["resumed"] for attempt in attempts(folder)) == resumed


@pytest.mark.full
def test_a_stopped_launcher_checkpoints_and_the_same_command_goes_on(tmp_path, pretended):
    path, run_dir = write(tmp_path, *LONG), tmp_path / "runs"
    first = start_launcher(path, run_dir)
    wait_for(first, lambda: len(checkpoints(run_dir)) == 2)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 143 and out.count("paused") == 2 and not err, (out, err)
    assert {launch.job_status(folder) for folder in (run_dir / "tiny").glob("[!.]*")} == {"interrupted"}
    second = start_launcher(path, run_dir)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0 and out.count("(resumed)") == 2, (out, err)
    assert_complete(path, run_dir, resumed=True)


@pytest.mark.full
def test_a_killed_launcher_leaves_its_runs_and_the_next_one_waits_for_them(tmp_path, pretended):
    path, run_dir = write(tmp_path, *LONG), tmp_path / "runs"
    first = start_launcher(path, run_dir)
    wait_for(first, lambda: len(checkpoints(run_dir)) == 2)
    first.kill()
    first.communicate()
    folders = list((run_dir / "tiny").glob("[!.]*"))
    assert {launch.job_status(folder) for folder in folders} == {"running"}
    suite = load_suite(path, check=False)
    assert launch.run_local(suite, run_dir, 2) == 0  # meanwhile they may have ended: nothing is started in either case
    assert_complete(path, run_dir, resumed=False)
    assert launch.run_local(suite, run_dir, 2) == 0
    assert [(len(attempts(folder)), attempts(folder)[0]["exit_code"]) for folder in folders] == [(1, 0)] * 2


@pytest.mark.full
def test_a_killed_worker_is_resumed_by_the_same_launch(tmp_path, pretended):
    path, run_dir = write(tmp_path, *LONG), tmp_path / "runs"
    launcher = start_launcher(path, run_dir)
    wait_for(launcher, lambda: len(checkpoints(run_dir)) == 2)
    children = [each for task in Path(f"/proc/{launcher.pid}/task").iterdir() for each in (task / "children").read_text().split()]
    for child in map(int, children):
        os.kill(child, signal.SIGKILL)
    out, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 0 and out.count("exit status -9, once more") == 2, (out, err)
    assert_complete(path, run_dir, resumed=True)


def test_a_job_that_fails_is_tried_twice_and_listed(tmp_path, pretended, capsys):
    path = write(tmp_path, ("toy_envs:Walk-v0", "Broken-v0"), ("[1, 2]", "[1]"))
    own = '[methods.blpo]\nenvironments = ["toy_envs:Walk-v0"]'
    suite = load_suite(write(tmp_path, ("[methods.blpo]", own), text=Path(path).read_text()), check=False)
    assert launch.run_local(suite, tmp_path / "runs", 1) == 1
    out, name = capsys.readouterr().out, "Broken-v0__ppo__1"
    assert f"FAILED {name}: exit status 1, once more" in out and "done   toy_envs_Walk-v0__blpo__1" in out
    assert "1 finished, 1 failed\n" in out
    assert f"failed: {name}, exit status 1, 1: RuntimeError: the hundredth step breaks" in out
    folder = tmp_path / "runs" / "tiny" / name
    assert launch.job_status(folder) == "failed" and len(attempts(folder)) == 2


def test_a_run_that_diverged_is_not_run_again_and_counts_as_a_random_policy(tmp_path, pretended, monkeypatch, capsys):
    """The script ends with the status 1 after 320 of 1,024 steps."""
    suite = load_suite(write(tmp_path, ("toy_envs:Walk-v0", "Exploding-v0"), ("[1, 2]", "[1]")), check=False).only(("ppo",), (), ())
    assert launch.run_local(suite, tmp_path / "runs", 1) == 0
    assert "done   Exploding-v0__ppo__1, diverged" in capsys.readouterr().out
    folder = tmp_path / "runs" / "tiny" / "Exploding-v0__ppo__1"
    (attempt,) = attempts(folder)
    assert attempt["exit_code"] == 1 and launch.job_status(folder) == "finished"
    assert launch.run_local(suite, tmp_path / "runs", 1) == 0
    assert launch.Attempt(folder).process is None and len(attempts(folder)) == 1

    content = collect(suite, tmp_path / "runs", tmp_path / "results" / "tiny")
    (run,) = content.runs
    assert run.diverged and run.wall_time_s is None and run.steps == 320 and content.failed == []
    rows = read_csv(tmp_path / "results" / "tiny" / "curves.csv")
    assert [row["global_step"] for row in rows] == ["256", "512", "768", "1024"] and rows[-1]["episodic_return"] == ""
    monkeypatch.setattr(data, "load_reference", lambda: {"Exploding-v0": {"random": -7.0}})
    loaded = data.load_results(suite, tmp_path / "results")
    assert loaded.runs["diverged"].tolist() == [True] and loaded.runs["final_return"].tolist() == [-7.0]
    curve = loaded.curves_of("ppo", "Exploding-v0")[1]
    assert curve.tolist() == [float(rows[0]["episodic_return"]), float(rows[1]["episodic_return"]), -7.0, -7.0]


def test_a_job_is_never_run_twice_at_once(tmp_path, pretended, monkeypatch):
    monkeypatch.setenv("PAUSE", "1")
    folder = launch.prepare(load_suite(write(tmp_path), check=False), tmp_path / "runs")[0]
    running = launch.Attempt(folder)
    try:
        assert launch.job_status(folder) == "running"
        with pytest.raises(launch.Elsewhere):
            launch.Attempt(folder)
    finally:
        running.process.kill()
        running.process.wait()
    assert running.poll() == -9 and launch.job_status(folder) == "failed"


@pytest.mark.parametrize(("said", "code"), [("finished", 0), ("diverged", 1), ("failed", 1), ("interrupted", 143), (None, None)])
def test_what_ended_while_no_launcher_lived_is_put_on_record(launched, pretended, tmp_path, said, code):
    subprocess.run(["cp", "-r", str(launched[1] / "tiny" / "toy_envs_Walk-v0__ppo__1"), str(tmp_path / "job")], check=True)
    folder = tmp_path / "job"
    (run,) = launch.run_folders(folder)
    edit_json(run / "result.json", lambda made: made.update(status=said))
    if said is None:
        (run / "result.json").unlink()
    for name in ("end", "exit_code", "load_at_end"):
        edit_json(folder / "job.json", lambda made, name=name: made["attempts"][0].pop(name))
    attempt = launch.Attempt(folder)
    if attempt.process is not None:
        attempt.process.kill()
        attempt.process.wait()
        attempt.poll()
    first = attempts(folder)[0]
    assert first["exit_code"] == code and first["end"] >= first["start"] and first["recorded"]
    assert len(attempts(folder)) == (1 if said in ("finished", "diverged") else 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_of_another_launcher_takes_a_workers_place_and_cores(tmp_path, pretended, monkeypatch, workers):
    """As after a killed launcher: one worker starts nothing beside its run, though its job is not chosen now; of two
    workers one waits, and the other runs all jobs on its own cores."""
    suite = load_suite(write(tmp_path, ("[1, 2]", "[1, 2, 3]")), check=False)
    suite = suite.only(("ppo",), (), (2, 3) if workers == 1 else ())
    folders = launch.prepare(suite, tmp_path / "runs")
    places = tmp_path / "runs" / "tiny" / ".places" / os.uname().nodename
    places.mkdir(parents=True)
    held, beside, done = launch.take_places(places, 0, workers), [], threading.Event()
    monkeypatch.setenv("PAUSE", "0.05")

    def look():
        """How many run beside it; with one worker it ends after a second."""
        while not done.wait(0.05) and (workers == 2 or len(beside) < 20):
            beside.append([launch.job_status(folder) for folder in folders].count("running"))
        launch.let_go(held)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        assert launch.run_local(suite, tmp_path / "runs", workers) == 0
    finally:
        done.set()
        thread.join()
    assert max(beside) == workers - 1
    made = [attempt for folder in folders for attempt in attempts(folder)]
    assert len(made) == len(folders) and {tuple(each["cores"]) for each in made} == {tuple(launch.split_cores(workers)[-1])}
    assert all(each["load_at_start"] >= 0 and each["load_at_end"] >= 0 for each in made)


def test_places_of_more_workers_are_dealt_out_to_fewer(tmp_path):
    four = [launch.take_places(tmp_path, worker, 4) for worker in range(4)]
    assert [len(each) for each in four] == [1] * 4 and launch.take_places(tmp_path, 0, 1) is None
    launch.let_go(four[0])
    launch.let_go(four[2])
    assert launch.take_places(tmp_path, 1, 2) is None and launch.take_places(tmp_path, 0, 1) is None
    two = launch.take_places(tmp_path, 0, 2)
    assert [Path(file.name).name for file in two] == ["0", "2"]
    for taken in (two, four[1], four[3]):
        launch.let_go(taken)
    assert len(launch.take_places(tmp_path, 0, 1)) == 4


def test_runs_are_tracked_in_a_group_of_the_suites_name(launched, pretended, tmp_path, monkeypatch):
    """Whatever starts the script sees the words and the group; nothing is sent anywhere."""
    started = {}

    class Started:
        pid = os.getpid()

        def __init__(self, words, env, **others):
            started.update(words=words, group=env["WANDB_RUN_GROUP"])

    folders = launch.prepare(load_suite(launched[0], check=False), tmp_path / "runs")
    monkeypatch.setattr(launch.subprocess, "Popen", Started)
    launch.Attempt(folders[0], track=True)
    assert started["group"] == "tiny" and started["words"][-1] == "--track"


# ---- Collect ---------------------------------------------------------------------------------------------------
def test_collect_bins_episodes_of_each_run_on_the_grid(launched, tmp_path):
    path, run_dir, _ = launched
    suite = load_suite(path, check=False)
    content = collect(suite, run_dir, tmp_path / "tiny", allow_mixed=True)
    assert len(content.runs) == 4 and content.missing == []
    table = read_csv(tmp_path / "tiny" / "curves.csv")
    assert [(row["method"], row["seed"]) for row in table[::4]] == [("blpo", "1"), ("blpo", "2"), ("ppo", "1"), ("ppo", "2")]
    for job in suite.jobs():
        rows = [row for row in table if (row["method"], row["seed"]) == (job.method, str(job.seed))]
        (run,) = launch.run_folders(run_dir / "tiny" / job.name)
        episodes = read_csv(run / "episodes.csv")
        assert [int(row["global_step"]) for row in rows] == [256, 512, 768, 1024]
        assert sum(int(row["episodes"]) for row in rows) == len(episodes)
        second = [float(e["episodic_return"]) for e in episodes if 256 < int(e["global_step"]) <= 512]
        assert float(rows[1]["episodic_return"]) == pytest.approx(sum(second) / len(second), abs=1e-3)
        metrics = read_csv(run / "metrics.csv")
        assert float(rows[-1]["wall_time_s"]) == pytest.approx(float(metrics[-1]["wall_time_s"]), abs=0.01)
        if job.method == "blpo":
            cosines = [float(m["bilevel/cosine"]) for m in metrics if 256 < int(m["global_step"]) <= 512]
            assert float(rows[1]["bilevel/cosine"]) == pytest.approx(sum(cosines) / len(cosines), rel=1e-3)
        else:
            assert {row["bilevel/cosine"] for row in rows} == {""}
    made = content.runs[0]
    assert made.command.startswith("python ppo_continuous.py --env-id toy_envs:Walk-v0 --seed 1") and made.commit == COMMIT
    assert made.versions["torch"] and made.wall_time_s == 1.024 and made.steps == 1024 and not made.diverged
    loaded = data.load_results(suite, tmp_path)
    assert loaded.runs["job"].tolist() == [job.name for job in suite.jobs()] and not loaded.missing
    shown = loaded.curves_of("ppo", "toy_envs:Walk-v0")
    assert shown.shape == (4, 2) and np.isfinite(shown.to_numpy()).all()


@pytest.mark.parametrize(
    ("final_return", "losses", "said"),
    [
        (1.0, {"policy_loss": "0.1", "value_loss": "0.2", "approx_kl": ""}, False),
        (None, {"policy_loss": "0.1", "value_loss": "0.2"}, False),
        (9.0, {"policy_loss": "", "value_loss": "0.2"}, True),  # argmax of logits that are nan: returns stay finite
        (1.0, {"actor_loss": "inf", "qf_loss": "0.2"}, True),
        (1.0, {"actor_loss": "0.1", "qf_loss": "nan"}, True),
        (math.nan, {"policy_loss": "0.1", "value_loss": "0.2"}, True),
    ],
)
def test_a_run_diverged_if_its_return_or_a_players_last_loss_is_not_finite(tmp_path, final_return, losses, said):
    names, cells = zip(*((f"losses/{name}", cell) for name, cell in losses.items()))
    table = [",".join(["global_step", *names]), ",".join(["1", *("0.5" for _ in names)]), ",".join(["2", *cells])]
    (tmp_path / "metrics.csv").write_text("\n".join(table) + "\n")
    assert diverged(tmp_path, final_return) == said


def test_collect_names_what_is_missing_and_keeps_what_was_collected_before(launched, tmp_path):
    path, run_dir, _ = launched
    more, results = write(tmp_path, ("[1, 2]", "[1, 2, 3]")), tmp_path / "results"
    content = collect(load_suite(more, check=False), run_dir, results, allow_mixed=True)
    assert content.missing == ["toy_envs_Walk-v0__ppo__3", "toy_envs_Walk-v0__blpo__3"]
    before = {name: (results / name).read_bytes() for name in ("curves.csv", "runs.json")}
    again = collect(load_suite(more, check=False), tmp_path / "nothing here", results, allow_mixed=True)
    assert again == content and {name: (results / name).read_bytes() for name in before} == before
    fewer = load_suite(write(tmp_path, ("[1, 2]", "[2]")), check=False)
    assert len(collect(fewer, run_dir, results, allow_mixed=True).runs) == 2
    assert {row["seed"] for row in read_csv(results / "curves.csv")} == {"2"}


def test_what_others_collected_is_left_alone(launched, tmp_path, capsys):
    """A suite of one's own, named like another one, neither empties that one's results nor draws or reports into them."""
    path, run_dir, _ = launched
    collect(load_suite(path, check=False), run_dir, tmp_path / "results" / "tiny", allow_mixed=True)
    (tmp_path / "results" / "tiny" / "notes.txt").touch()
    own = write(tmp_path)
    before = snapshot(tmp_path / "results")
    assert command_line.main(["collect", path, "--run-dir", str(tmp_path), "--results", str(tmp_path / "new")]) == 2
    assert "tiny has finished; --run-dir says where they are" in capsys.readouterr().err and not (tmp_path / "new").exists()
    for words in (["collect", own], ["collect", own, "--run-dir", str(run_dir)], ["plot", own]):
        assert command_line.main([*words, "--results", str(tmp_path / "results")]) == 2
        assert f"tiny holds the results of {path}, not of {own}; name another --results" in capsys.readouterr().err
    assert snapshot(tmp_path / "results") == before
    committed = load_suite("smoke", check=False).model_copy(update={"scratch": False})
    assert command_line.results_of(load_suite(own, check=False), None) == suites.SCRATCH
    assert command_line.results_of(load_suite("smoke", check=False), None) == suites.SCRATCH
    assert command_line.results_of(committed, None) == suites.RESULTS
    assert command_line.results_of(committed, tmp_path) == tmp_path


def test_report_and_plot_without_results_write_nothing(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("a page")
    assert command_line.main(["report", "--results", str(tmp_path), "--output", str(page)]) == 2
    assert capsys.readouterr().err == f"error: --results {tmp_path} has no results of any suite\n"
    assert command_line.main(["report", "--output", str(tmp_path / "no" / "page.md")]) == 2
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err
    assert command_line.main(["plot", "ppo_levels", "--results", str(tmp_path)]) == 2
    assert "has no runs.json; collect the suite first" in capsys.readouterr().err
    assert page.read_text() == "a page" and list(tmp_path.iterdir()) == [page]


DAMAGE = [
    ("job.json", "{", "job.json: Invalid JSON"),
    ("job.json", '{"job": "x"}', "job.json: suite: this key is missing"),
    ("*/args.json", "[]", "args.json: Input should be an object"),
    ("*/metrics.csv", "global_step\n1\n", "metrics.csv cannot be read"),
    ("*/metrics.csv", "global_step,wall_time_s\n1,soon\n", "metrics.csv cannot be read: could not convert string to float: 'soon'"),
    ("*/episodes.csv", None, "episodes.csv cannot be read: [Errno 2]"),
]


@pytest.mark.parametrize(("pattern", "text", "words"), DAMAGE)
def test_collect_refuses_damaged_files_and_writes_nothing(copied, tmp_path, capsys, pattern, text, words):
    suite, run_dir = copied
    (path,) = (run_dir / "tiny" / "toy_envs_Walk-v0__ppo__1").glob(pattern)
    path.unlink() if text is None else path.write_text(text)
    results = ["--run-dir", str(run_dir), "--results", str(tmp_path / "results")]
    assert command_line.main(["collect", str(suite.path), *results]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path.parent}") and words in said and said.count("\n") == 1, said
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("runs.json", '"runs":[', '"runs":{', "runs.json: Invalid JSON"),
        ("runs.json", '"job"', '"jib"', "runs.json: runs[0].job: this key is missing"),
        ("runs.json", '"seed":1,', '"seed":"one",', "runs.json: runs[0].seed: Input should be a valid integer"),
        ("curves.csv", "global_step", "step", "curves.csv cannot be read: the column global_step is missing"),
        ("curves.csv", ",256,", ",512,", "curves.csv cannot be read: a run has a point twice"),
        ("curves.csv", ",256,", ",soon,", "curves.csv cannot be read: invalid literal"),
        ("curves.csv", ",blpo,", ",sac,", "curves.csv has no rows of toy_envs_Walk-v0__blpo__1, a run of runs.json"),
    ],
)
def test_damaged_results_are_refused(copied, tmp_path, name, old, new, words):
    suite, run_dir = copied
    collect(suite, run_dir, tmp_path / "results" / "tiny")
    path = tmp_path / "results" / "tiny" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BadSuite) as error:
        data.load_results(suite, tmp_path / "results")
    assert words in str(error.value) and str(path) in str(error.value)


def attempts(folder: Path) -> list[dict]:
    """The attempts at a job."""
    return json.loads((folder / "job.json").read_text())["attempts"]


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def copied(launched, tmp_path):
    """A copy of the tiny suite's runs."""
    subprocess.run(["cp", "-r", str(launched[1]), str(tmp_path / "runs")], check=True)
    return load_suite(launched[0], check=False), tmp_path / "runs"


def test_collect_refuses_mixed_commits_arguments_and_uncommitted_code(copied, tmp_path):
    suite, run_dir = copied
    results = tmp_path / "results"
    collect(suite, run_dir, results)
    first = run_dir / "tiny" / "toy_envs_Walk-v0__ppo__1"
    before, saved = snapshot(results), (first / "job.json").read_text()

    def refused(words: str) -> None:
        with pytest.raises(BadSuite, match=words):
            collect(suite, run_dir, results)
        assert snapshot(results) == before
        assert collect(suite, run_dir, tmp_path / "other", allow_mixed=True).mixed
        (first / "job.json").write_text(saved)

    edit_json(first / "job.json", lambda made: made["attempts"][0].update(commit="0" * 40))
    refused("the commits 0000000000, ")
    edit_json(first / "job.json", lambda made: made["attempts"][0].update(dirty=True))
    refused("uncommitted code .toy_envs_Walk-v0__ppo__1.")
    edit_json(first / "job.json", lambda made: made["command"].append("--no-norm-adv"))
    refused("a run with other arguments than the suite's now")
    (run,) = launch.run_folders(first)
    edit_json(run / "args.json", lambda made: made["args"].update(gamma=0.9))
    refused("runs of ppo on toy_envs:Walk-v0 with different gamma")


@pytest.mark.parametrize("text", [None, "{", '{"scale": "s", "environments": {"Hopper-v4": 3}}', '{"scale": "s"}'])
def test_levels_that_are_damaged_or_missing_are_one_sentence(text, tmp_path, monkeypatch):
    from benchmark import reference

    path = tmp_path / "reference.json"
    monkeypatch.setattr(reference, "REFERENCE", path)
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadSuite, match="reference.json"):
        reference.load_reference.__wrapped__()


def test_an_argument_left_out_of_a_command_takes_its_value_along_and_a_flag_has_none():
    command = "python ppo.py --no-clip-vloss --seed 3 --gamma -0.5 --norm-adv --damping 2".split()
    assert without(["clip-vloss", "gamma"], command) == "python ppo.py --seed 3 --norm-adv --damping 2"
    assert without(["norm-adv", "damping"], command) == "python ppo.py --no-clip-vloss --seed 3 --gamma -0.5"


def test_commands_are_compared_without_restated_arguments(copied, tmp_path):
    """The suite now says what was the default when the runs were made; another suite that takes the runs may say so too."""
    suite, run_dir = copied
    said = ('script = "ppo_continuous.py"', 'script = "ppo_continuous.py"\narguments = { critic-learning-rate = 2.8e-3 }')
    with pytest.raises(BadSuite, match="with other arguments than the suite's now .toy_envs_Walk-v0__ppo__1"):
        collect(load_suite(write(tmp_path, said), check=False), run_dir, tmp_path / "results")
    restated = write(tmp_path, said, ("grid = 256", 'grid = 256\nrestated = ["critic-learning-rate"]'))
    assert collect(load_suite(restated), run_dir, tmp_path / "results").mixed == []
    job = suite.jobs()[0]
    assert suites.same_run(job.command, [*job.command, "--gamma", "0.9"], ("gamma",))
    assert not suites.same_run(job.command, [*job.command, "--gamma", "0.9"])


@pytest.mark.parametrize(
    ("made", "commit", "dirty", "cpu"),
    [
        ({"commit": "ab12", "dirty": True, "cpu": "a processor", "gpu": None}, "ab12", True, "a processor"),
        ({"commit": "ab12-dirty"}, "ab12", True, None),
        ({"commit": "ab12"}, "ab12", False, None),
        ({"commit": None}, None, False, None),
    ],
)
def test_a_run_that_was_started_by_hand_tells_where_it_came_from(copied, made, commit, dirty, cpu):
    """In either form of args.json."""
    suite, run_dir = copied
    folder = run_dir / "tiny" / "toy_envs_Walk-v0__ppo__1"
    edit_json(folder / "job.json", lambda job: job.update(attempts=[]))
    (run,) = launch.run_folders(folder)
    args = json.loads((run / "args.json").read_text())["args"]
    (run / "args.json").write_text(json.dumps(made | {"args": args}))
    told = describe(folder, run)
    assert (told.commit, told.dirty, told.cpu, told.gpu, told.attempts, told.cores) == (commit, dirty, cpu, None, 0, None)


def test_collect_on_the_command_line_records_missing_and_failed_jobs(copied, tmp_path, capsys):
    suite, run_dir = copied
    ppo, blpo, other = (run_dir / "tiny" / f"toy_envs_Walk-v0__{name}" for name in ("ppo__1", "blpo__1", "ppo__2"))
    for folder, code in ((ppo, 1), (blpo, 143)):  # that one was stopped and may go on
        (run,) = launch.run_folders(folder)
        edit_json(run / "result.json", lambda made: made.update(status="failed"))
        edit_json(folder / "job.json", lambda made, code=code: made["attempts"][-1].update(exit_code=code))
    edit_json(other / "job.json", lambda made: made["attempts"].insert(0, made["attempts"][0] | {"load_at_start": 99.5}))
    words = ["collect", str(suite.path), "--run-dir", str(run_dir), "--results", str(tmp_path / "results")]
    assert command_line.main(words) == 0
    folder = tmp_path / "results" / "tiny"
    said = f"2 runs in {folder}\nmissing: {ppo.name}, {blpo.name}\nfailed: {ppo.name}\n"
    assert capsys.readouterr().out == said
    content = data.read_runs(folder)
    (run,) = (run for run in content.runs if run.job == other.name)
    assert (run.attempts, run.load) == (2, 99.5)
    again = collect(suite, tmp_path / "nothing here", folder)
    assert again.failed == [ppo.name] and again.runs == content.runs


def test_collect_works_without_git(copied, tmp_path, monkeypatch):
    suite, run_dir = copied
    for path in run_dir.glob("tiny/*/job.json"):  # as if run where there was no git either
        edit_json(path, lambda made: made["attempts"][0].update(commit=None, dirty=None))
    monkeypatch.setenv("PATH", str(tmp_path))
    blob.cache_clear()
    assert blob("HEAD", "ppo_continuous.py") is None
    content = collect(suite, run_dir, tmp_path / "results")
    assert content.mixed == [] and {run.commit for run in content.runs} == {None}
    blob.cache_clear()


def test_a_launch_records_the_end_of_runs_that_finished_without_one(copied, capsys):
    suite, run_dir = copied
    folder = run_dir / "tiny" / "toy_envs_Walk-v0__ppo__1"
    edit_json(folder / "job.json", lambda made: made["attempts"][0].pop("exit_code"))
    held = launch.locked(folder / "lock")
    assert launch.run_local(suite, run_dir, 1) == 0 and "exit_code" not in attempts(folder)[0]  # its process lives
    held.close()
    assert launch.run_local(suite, run_dir, 1) == 0
    (attempt,) = attempts(folder)
    assert attempt["exit_code"] == 0 and attempt["recorded"] and "4 finished" in capsys.readouterr().out


# ---- Committed results -----------------------------------------------------------------------------------------
def test_what_is_written_is_read_back(tmp_path):
    entry = dict(
        method="m", environment="e", script="x.py", command="python x.py", commit=None, commits=[None], script_blob=None,
        dirty=False, cpu="c", gpu=None, cores=None, attempts=1, final_return=1.5, wall_time_s=None, steps=10,
    )  # fmt: skip
    runs = [
        data.Entry(job=f"e__m__{seed}", seed=seed, arguments={"limit": limit}, versions={"torch": "2"}, **entry)
        for seed, limit in ((1, 8), (2, None), (3, math.inf))
    ]
    rows = [("e", "m", seed, step, "1.0", "", "0") for seed in (3, 2, 1) for step in (20, 10)]
    curves = pd.DataFrame(rows, columns=data.COLUMNS)
    data.write_results(tmp_path, data.RunsFile(suite="s", runs=runs), curves)
    lines = (tmp_path / "runs.json").read_text().splitlines()
    assert len(lines) == len(runs) + 2 and json.loads("".join(lines))["runs"][2]["arguments"] == {"limit": math.inf}
    assert data.read_runs(tmp_path).runs == runs and data.read_runs(tmp_path / "none") is None
    assert data.read_runs(tmp_path).file == "benchmark/suites/s.toml"
    read = data.read_curves(tmp_path)
    assert read["seed"].tolist() == [1, 1, 2, 2, 3, 3] and read["global_step"].tolist() == [10, 20] * 3
    assert read["episodic_return"].isna().all() and read["wall_time_s"].tolist() == [1.0] * 6


@pytest.mark.parametrize("name", [each for each in known_suites() if (suites.RESULTS / each / "runs.json").exists()])
def test_the_committed_results_are_sound(name):
    loaded = data.load_results(load_suite(name, check=False), suites.RESULTS)
    assert len(loaded.runs) and len(loaded.runs) + len(loaded.missing) == len(load_suite(name, check=False).shown())
    assert set(map(tuple, loaded.curves[data.RUN].drop_duplicates().to_numpy())) == set(map(tuple, loaded.runs[data.RUN].to_numpy()))


# ---- Tuning ----------------------------------------------------------------------------------------------------
SEARCH = """
[tune]
seeds = [11, 12]
trials = 3

[tune.space.ppo]
gamma = [0.9, 0.99]
learning-rate = [1e-3, 1e-2]

[tune.space.blpo]
damping = { low = 0.1, high = 10.0, log = true }
update-epochs = { low = 1, high = 2 }
"""


@pytest.fixture
def levels(monkeypatch):
    """Levels of the toy task, for this test."""
    from benchmark import reference, scores

    known = reference.load_reference() | {"toy_envs:Walk-v0": {"random": 0.0, "reference": 10.0}}
    for module in (reference, scores, data):
        monkeypatch.setattr(module, "load_reference", lambda: known)


def searched(tmp_path: Path, *changes: tuple[str, str]):
    return load_suite(write(tmp_path, ("[methods.ppo]", SEARCH + "\n[methods.ppo]"), *changes), check=False)


def test_trials_are_the_same_at_every_call_and_as_many_for_each_method(tmp_path, levels):
    suite = searched(tmp_path)
    trials = tune.trials_of(suite)
    assert list(trials) == [f"{method}-t{number}" for method in ("ppo", "blpo") for number in (1, 2, 3)]
    assert trials == tune.trials_of(suite)
    grid = [trials[f"ppo-t{number}"] for number in (1, 2, 3)]
    assert all(grid.count(point) == 1 and set(point) == {"gamma", "learning-rate"} for point in grid)
    drawn = [trials[f"blpo-t{number}"] for number in (1, 2, 3)]
    assert all(0.1 <= point["damping"] <= 10 and point["update-epochs"] in (1, 2) for point in drawn)
    assert len({point["damping"] for point in drawn}) == 3
    with pytest.raises(BadSuite, match="tune.space.ppo has 4 points, fewer than tune.trials = 5"):
        tune.trials_of(searched(tmp_path, ("trials = 3", "trials = 5")))
    jobs = tune.as_suite(suite, trials, dict.fromkeys(trials, (11, 12))).jobs()
    assert len(jobs) == 12 and {job.seed for job in jobs} == {11, 12}


def quality(point: dict) -> float:
    """What a run of a trial would return: the best are gamma 0.99 with 1e-2, and the largest damping."""
    return point.get("gamma", 0) * 100 + point.get("learning-rate", 0) + point.get("damping", 0)


@pytest.fixture
def imagined(monkeypatch):
    """Instead of collecting: results made of `quality`, the curves with the opposite order."""

    def imagine(suite, run_dir, folder, allow_mixed):
        index = pd.Index([256, 512, 768, 1024], name="global_step")
        runs, curves = [], []
        for job in suite.jobs():
            value = quality(suite.methods[job.method].arguments)
            runs.append(data.Entry(
                **{name: getattr(job, name) for name in ("method", "environment", "seed", "script")}, job=job.name,
                command=" ".join(["python", *job.command]), arguments={}, commit=None, commits=[None], script_blob=None, dirty=False,
                versions={}, cpu=None, gpu=None, cores=None, attempts=1, final_return=value, wall_time_s=1.0, steps=1024,
            ))  # fmt: skip
            who = {name: getattr(job, name) for name in data.RUN}
            curves.append(pd.DataFrame(who | {"global_step": index, "wall_time_s": "1", "episodic_return": str(-value), "episodes": "1"}))
        data.write_results(folder, data.RunsFile(suite=suite.name, runs=runs), pd.concat(curves))

    monkeypatch.setattr(tune, "collect", imagine)


@pytest.mark.parametrize(
    ("rule", "winner", "launched"),
    [
        ("", ("0.99", "0.01"), [16]),
        ('rule = "rank"', ("0.99", "0.01"), [16]),
        ("halving = 2", ("0.99", "0.01"), [8, 4]),
        ('rule = "rank"\nover = "training"', ("0.9", "0.001"), [16]),
    ],
)
def test_the_winner_is_chosen_by_the_suites_rule(tmp_path, levels, imagined, capsys, rule, winner, launched):
    suite, numbers = searched(tmp_path, ("trials = 3", f"trials = 4\n{rule}")), []

    def launch_nothing(jobs, run_dir):
        numbers.append(len(jobs.jobs()))
        assert jobs.name == "tiny" and run_dir == tmp_path / "runs" / "tune"
        return 0

    assert tune.search(suite, tmp_path / "runs", tmp_path / "results", launch_nothing) == 0
    assert numbers == launched
    rows = read_csv(tmp_path / "results" / "tune" / "tiny" / "trials.csv")
    assert [row["method"] for row in rows] == ["ppo"] * 4 + ["blpo"] * 4
    best, (told, also) = rows[0], capsys.readouterr().out.splitlines()[1:]
    assert (best["gamma"], best["learning-rate"]) == winner
    assert told == (
        f"ppo: {best['trial']} wins by {suite.tune.rule}: arguments = {{ gamma = {winner[0]}, learning-rate = {winner[1]} }}"
    )
    dampings = [float(row["damping"]) for row in rows if row["method"] == "blpo" and row["seeds"] == "2"]
    assert dampings == sorted(dampings, reverse=suite.tune.over == "end") and also.startswith("blpo: blpo-t")
    assert tune.search(suite, tmp_path / "runs", tmp_path / "results", lambda jobs, run_dir: 143) == 143


def test_points_that_a_search_gets_later_leave_its_trials_as_they_are(tmp_path, levels, imagined):
    more, numbers = "trials = 3\nhalving = 2\nmore = [{ gamma = 0.999 }, { gae-lambda = 0.8 }]", []
    before, suite = tune.trials_of(searched(tmp_path)), searched(tmp_path, ("trials = 3", more))
    after = tune.trials_of(suite)
    added = {name: point for name, point in after.items() if name not in before}
    assert before.items() <= after.items() and list(added) == ["ppo-t4", "ppo-t5", "blpo-t4", "blpo-t5"]
    assert added["ppo-t4"] == added["blpo-t4"] == {"gamma": 0.999} and added["blpo-t5"] == {"gae-lambda": 0.8}
    tune.search(suite, tmp_path / "runs", tmp_path / "results", lambda jobs, _: numbers.append(len(jobs.jobs())))
    assert numbers == [10, 6]  # five trials of each method, then the better three


@pytest.mark.full
def test_tuning_on_the_command_line(tmp_path, levels, pretended, capsys):
    changes = ("trials = 3", "trials = 2"), ("seeds = [11, 12]", "seeds = [11]"), ("[methods.ppo]", SEARCH + "\n[methods.ppo]")
    path = write(tmp_path, *reversed(changes))
    words = ["tune", path, "--run-dir", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--allow-mixed"]
    assert command_line.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("4 jobs\n") and not (tmp_path / "results").exists()
    assert command_line.main([*words, "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "4 trials in" in out and "ppo: ppo-t" in out and "blpo: blpo-t" in out
    assert {path.name for path in (tmp_path / "results" / "tune" / "tiny").iterdir()} == {"curves.csv", "runs.json", "trials.csv"}


def test_a_bad_trial_is_refused_before_anything_starts(tmp_path, levels, capsys):
    bad = ("gamma = [0.9, 0.99]", "gamma = [0.9, 9.9]"), ("[methods.ppo]", SEARCH + "\n[methods.ppo]")
    path = write(tmp_path, *reversed(bad))
    assert command_line.main(["tune", path, "--run-dir", str(tmp_path / "runs")]) == 2
    assert "tiny.toml: tune.space: methods.ppo-t" in (said := capsys.readouterr().err) and "--gamma is 9.9" in said
    assert command_line.main(["tune", write(tmp_path), "--run-dir", str(tmp_path / "runs")]) == 2
    assert "tiny.toml: tune: this key is missing" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_signed_cartpole_is_cartpole_pushed_by_a_sign():
    signed, plain = gym.make("benchmark.tasks:SignedCartPole-v1"), gym.make("CartPole-v1")
    assert signed.action_space == gym.spaces.Box(-1, 1, (1,), np.float32) and signed.spec.max_episode_steps == 500
    for seed, numbers in enumerate(np.random.default_rng(0).uniform(-1, 1, (20, 500, 1)).astype(np.float32)):
        assert np.array_equal(signed.reset(seed=seed)[0], plain.reset(seed=seed)[0])
        for number in numbers:
            step, expected = signed.step(number), plain.step(1 if number > 0 else 0)
            assert np.array_equal(step[0], expected[0]) and step[1:4] == expected[1:4]
            if expected[2]:
                break
