"""benchmark/: suite files, the local launcher through kills and failures, and what collect makes of run folders."""

import json
import math
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import REPO, environment, read_csv, wait_for

from benchmark import __main__ as command_line
from benchmark import launch, suites
from benchmark.collect import Mixed, blob, collect, diverged, origin
from benchmark.scores import load_results
from benchmark.suites import BadSuite, known_suites, load_suite

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
arguments = { chunk-length = 8, nystrom-rank = 3 }
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
@pytest.mark.full
@pytest.mark.parametrize("name", known_suites())
def test_the_suites_of_the_repository_are_sound(name):
    suite = load_suite(name)
    assert suite.jobs() and suite.description


@pytest.mark.full
@pytest.mark.parametrize("name", known_suites())
def test_the_list_of_suites_counts_their_runs(name):
    """docs/benchmark.md: how many runs a suite launches, and how many have been collected."""
    row = next(line for line in (REPO / "docs" / "benchmark.md").read_text().splitlines() if f"[`{name}`](" in line and line[0] == "|")
    _, _, _, runs, _, collected, _ = (cell.strip() for cell in row.split("|"))
    assert runs.split()[0] == str(len(load_suite(name).jobs()))
    path = REPO / "benchmark" / "results" / name / "runs.json"
    if path.exists():
        assert f"[{len(json.loads(path.read_text())['runs'])} runs](results.md#{name})" in collected
    else:
        assert collected in ("not yet", "-") or f"#{name})" not in collected


def test_jobs_are_every_combination_once_in_a_stable_order(tmp_path):
    suite = load_suite(write(tmp_path))
    names = [job.name for job in suite.jobs()]
    assert names == [f"toy_envs_Walk-v0__{method}__{seed}" for seed in (1, 2) for method in ("ppo", "blpo")]
    assert names == [job.name for job in load_suite(write(tmp_path)).jobs()]
    command = suite.jobs()[1].command
    assert command[:7] == ["blpo_continuous.py", "--env-id", "toy_envs:Walk-v0", "--seed", "1", "--exp-name", "blpo"]
    assert command[-4:] == ["--chunk-length", "8", "--nystrom-rank", "3"]


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
    with pytest.raises(BadSuite, match="runs-of takes runs that are untimed in source; give it the same key untimed"):
        load_suite(write(tmp_path, taken))


def test_a_suite_or_a_method_may_be_untimed(tmp_path):
    suite = load_suite(write(tmp_path, ("grid = 256", 'grid = 256\nuntimed = "busy"'), ('label = "PPO"', 'label = "PPO"\nuntimed = "shared"')))
    assert (suite.methods["ppo"].untimed, suite.methods["blpo"].untimed) == ("shared", "busy")


def test_a_part_of_a_suite_can_be_chosen(tmp_path, capsys):
    suite = load_suite(write(tmp_path))
    assert [(job.method, job.seed) for job in suite.only(("blpo",), (), (2,)).jobs()] == [("blpo", 2)]
    assert suite.only((), ("toy_envs:Walk-v0",), ()).jobs() == suite.jobs()
    assert command_line.main(["run", write(tmp_path), "--dry-run", "--methods", "blbo"]) == 2
    assert capsys.readouterr().err == "error: --methods names blbo, which tiny does not have; the nearest are blpo\n"


DEAD = '[dead]\ncolumn = "losses/no"\nbelow = 1e-8\nwords = "dead actor"\n\n'
GATE = '[[gates]]\nmethod = "ppo"\ncolumn = "bilevel/no"\nmost = 0.2\n\n'
BAD = [
    ([("[1, 2]", "[]")], "tiny.toml: seeds is empty"),
    ([("[1, 2]", "[1, 1]")], "seeds holds 1 twice, which would make the same job twice"),
    ([("[1, 2]", "[-1]")], "seeds holds -1"),
    ([("[1, 2]", '"one"')], "seeds must be a list"),
    ([('["toy_envs:Walk-v0"]', '["toy_envs:Walk-v0", "toy_envs:Walk-v0"]')], "environments holds toy_envs:Walk-v0 twice"),
    ([('["toy_envs:Walk-v0"]', '["Hoper-v4"]')], "'Hoper-v4' cannot be made"),
    ([('["toy_envs:Walk-v0"]', '["CartPole-v1"]')], "for discrete actions use ppo_discrete.py"),
    ([("ppo_continuous.py", "ppo_continous.py")], "methods.ppo: there is no script 'ppo_continous.py'; the nearest are ppo_"),
    ([("nystrom-rank", "nystrom-rnk")], "methods.blpo: blpo_continuous.py has no argument 'nystrom-rnk'; the nearest are nystrom"),
    ([("nystrom-rank = 3", "nystrom-rank = 0")], "--nystrom-rank is 0: Input should be greater than or equal to 1"),
    ([("nystrom-rank = 3", 'nystrom-rank = "many"')], "cannot read the arguments"),
    ([("num-minibatches = 2", "num-minibatches = 3")], "--num-minibatches 3 must divide"),
    ([("device", "seed = 3\ndevice")], "the argument seed is the launcher's own"),
    ([("grid = 256", "grid = 0")], "grid is 0, it must be at least 1"),
    ([("grid = 256", "gird = 256")], "the key 'gird' is unknown; the nearest are grid"),
    ([('label = "PPO"\n', "")], "methods.ppo: the key 'label' is missing"),
    ([('baselines = ["ppo"]', 'baselines = ["sac"]')], "baselines names 'sac', which is no method of the suite"),
    ([("grid = 256", 'grid = 256\nfigures = ["sac"]')], "figures names 'sac', which is no method of the suite"),
    ([("grid = 256", 'grid = 256\nheadline = "yes"')], "headline must be true or false, not 'yes'"),
    ([("grid = 256", 'grid = 256\nunready = "it waits"')], "nothing of it may be launched yet: it waits; then remove the key unready"),
    ([("[methods.ppo]", DEAD + "[methods.ppo]")], "dead: column is 'losses/no', which is none of the suite's diagnostics"),
    ([("[methods.ppo]", DEAD.replace("1e-8", "0") + "[methods.ppo]")], "dead: below must be a number with a point or an exponent, not 0"),
    ([('label = "PPO"', 'label = "PPO"\nruns-of = "smoke"')], "methods.ppo: runs-of is 'smoke'; it names a suite and a method"),
    ([('label = "PPO"', 'label = "PPO"\nruns-of = "smok.ppo"')], "runs-of names the suite 'smok', which there is not; the nearest are smoke"),
    ([('label = "PPO"', 'label = "PPO"\nruns-of = "smoke.pppo"')], "runs-of names 'pppo', which is no method of smoke; the nearest are ppo"),
    ([('label = "PPO"', 'label = "PPO"\nruns-of = "smoke.ppo"')], "runs-of takes runs on the grid 1000 of smoke, but the suite's is 256"),
    ([("[methods.ppo]", GATE + "[methods.ppo]")], "gates[0]: column is 'bilevel/no', which is none of the suite's diagnostics"),
    ([("[methods.ppo]", GATE.replace('"ppo"', '"sac"') + "[methods.ppo]")], "gates[0]: method is 'sac', which is none of the suite"),
    ([("[methods.ppo]", GATE.replace("most = 0.2", "") + "[methods.ppo]")], "gates[0]: it has no bound"),
    ([("[methods.ppo]", "[methods.P_P_O]")], "the name of a method is made of small letters"),
    ([("[arguments]", "[arguments")], "this is no TOML"),
    ([(SUITE, SUITE + CLAIM)], "claims compare returns on toy_envs:Walk-v0, which reference.json has no levels of"),
    ([(SUITE, SUITE + CLAIM + 'measure = "best"\n')], 'measure is \'best\', it must be "return", "above" or "time"'),
    ([(SUITE, SUITE + CLAIM + 'over = "all"\n')], 'over is \'all\', it must be "end", "training" or "evaluation"'),
    ([(SUITE, SUITE + CLAIM + 'over = "evaluation"\n')], "over evaluation takes charts/eval_return, which is none of the suite's diagnostics"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_a_bad_suite_is_one_sentence_and_creates_nothing(tmp_path, capsys, changes, words):
    path = write(tmp_path, *changes)
    status = command_line.main(["run", path, "--run-dir", str(tmp_path / "runs")])
    said = capsys.readouterr().err
    assert status == 2 and said.startswith("error: tiny.toml") and words in said, said
    assert said.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_an_unknown_suite_names_the_nearest(capsys):
    assert command_line.main(["run", "smok"]) == 2
    assert capsys.readouterr().err == "error: there is no suite 'smok'; the nearest are smoke\n"


def test_the_jobs_of_an_unready_suite_can_be_looked_at(tmp_path, capsys):
    assert command_line.main(["run", write(tmp_path, ("grid = 256", 'grid = 256\nunready = "it waits"')), "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("4 jobs\n")


def test_dry_run_prints_the_jobs_and_creates_nothing(tmp_path, capsys):
    words = ["run", write(tmp_path), "--run-dir", str(tmp_path / "runs"), "--dry-run"]
    assert command_line.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1] == "4 jobs" and not (tmp_path / "runs").exists()
    assert lines[0].startswith("waiting     toy_envs_Walk-v0__ppo__1: python ppo_continuous.py --env-id toy_envs:Walk-v0 --seed 1")


# ---- The launcher ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def launched(tmp_path_factory, toy_envs):
    """The tiny suite, run to its end with two workers: (path of the suite, run_dir, exit status). Read only."""
    folder = tmp_path_factory.mktemp("launched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPO / "tests"))
        path = write(folder)
        return path, folder / "runs", command_line.main(["run", path, "--run-dir", str(folder / "runs"), "--workers", "2"])


def snapshot(folder: Path) -> dict[str, int]:
    """When every file below was last changed."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_job_has_a_folder_log_exit_code_and_provenance(launched):
    path, run_dir, status = launched
    assert status == 0
    jobs = load_suite(path).jobs()
    assert sorted(each.name for each in (run_dir / "tiny").iterdir()) == sorted(job.name for job in jobs)
    for job in jobs:
        folder = run_dir / "tiny" / job.name
        assert (folder / "exit_code").read_text() == "0\n" and "finished at step 1,024" in (folder / "log.txt").read_text()
        made = json.loads((folder / "job.json").read_text())
        assert made["command"] == job.command and len(made["attempts"]) == 1
        assert made["attempts"][0]["commit"] and made["attempts"][0]["versions"]["torch"] and made["attempts"][0]["host"]
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
    assert command_line.main(["run", path, "--run-dir", str(run_dir)]) == 0
    assert snapshot(run_dir) == before


def test_a_folder_of_other_arguments_is_not_overwritten(launched, tmp_path, capsys):
    path, run_dir, _ = launched
    changed = write(tmp_path, ("update-epochs = 1", "update-epochs = 2"))
    before = snapshot(run_dir)
    assert command_line.main(["run", changed, "--run-dir", str(run_dir)]) == 2
    assert "was made with other arguments" in capsys.readouterr().err and snapshot(run_dir) == before


LONG = [("[1, 2]", "[1]"), ("total-timesteps = 1024", "total-timesteps = 38400")]


def start_launcher(path: str, run_dir: Path, workers: int = 2) -> subprocess.Popen:
    """`python -m benchmark run` in a process of its own."""
    words = [sys.executable, "-m", "benchmark", "run", path, "--run-dir", str(run_dir), "--workers", str(workers)]
    return subprocess.Popen(words, cwd=REPO, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def checkpoints(run_dir: Path) -> list[Path]:
    return list(run_dir.glob("tiny/*/*/checkpoint.pt"))


def assert_complete(path: str, run_dir: Path, resumed: bool) -> None:
    """Every job has finished in one run folder whose csv files have every step once."""
    for job in load_suite(path).jobs():
        folder = run_dir / "tiny" / job.name
        (run,) = launch.run_folders(folder)
        steps = [int(row["global_step"]) for row in read_csv(run / "metrics.csv")]
        assert steps == list(range(64, 38401, 64))
        assert launch.job_status(folder) == "finished"
        attempts = json.loads((folder / "job.json").read_text())["attempts"]
        assert any(attempt["resumed"] for attempt in attempts) == resumed


@pytest.mark.full
def test_a_stopped_launcher_checkpoints_and_the_same_command_goes_on(tmp_path):
    path, run_dir = write(tmp_path, *LONG), tmp_path / "runs"
    first = start_launcher(path, run_dir)
    wait_for(first, lambda: len(checkpoints(run_dir)) == 2)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 143 and out.count("paused") == 2 and not err, (out, err)
    assert {launch.job_status(folder) for folder in (run_dir / "tiny").iterdir()} == {"interrupted"}
    second = start_launcher(path, run_dir)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0 and out.count("(resumed)") == 2, (out, err)
    assert_complete(path, run_dir, resumed=True)


@pytest.mark.full
def test_a_killed_launcher_leaves_its_runs_and_the_next_one_waits_for_them(tmp_path):
    path, run_dir = write(tmp_path, *LONG), tmp_path / "runs"
    first = start_launcher(path, run_dir)
    wait_for(first, lambda: len(checkpoints(run_dir)) == 2)
    first.kill()
    first.communicate()
    assert {launch.job_status(folder) for folder in (run_dir / "tiny").iterdir()} == {"running"}
    second = start_launcher(path, run_dir)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0 and "start" not in out, (out, err)
    assert_complete(path, run_dir, resumed=False)


@pytest.mark.full
def test_a_killed_worker_is_resumed_by_the_same_launch(tmp_path):
    path, run_dir = write(tmp_path, *LONG), tmp_path / "runs"
    launcher = start_launcher(path, run_dir)
    wait_for(launcher, lambda: len(checkpoints(run_dir)) == 2)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in map(int, children):
        os.kill(child, signal.SIGKILL)
    out, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 0 and out.count("exit status -9, once more") == 2, (out, err)
    assert_complete(path, run_dir, resumed=True)


@pytest.mark.full
def test_a_job_that_fails_is_tried_twice_and_listed(tmp_path, capsys):
    path = write(tmp_path, ("toy_envs:Walk-v0", "toy_envs:toy/Broken-v0"), ("[1, 2]", "[1]"))
    path = write(tmp_path, ("[methods.blpo]", "[methods.blpo]\nenvironments = [\"toy_envs:Walk-v0\"]"), text=Path(path).read_text())
    assert command_line.main(["run", path, "--run-dir", str(tmp_path / "runs")]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "exit status 1, once more" in out and "1 failed" in out and "done toy_envs_Walk-v0__blpo__1" in out
    folder = tmp_path / "runs" / "tiny" / "toy_envs_toy_Broken-v0__ppo__1"
    assert launch.job_status(folder) == "failed" and (folder / "exit_code").read_text() == "1\n"
    assert len(json.loads((folder / "job.json").read_text())["attempts"]) == 2
    assert (folder / "log.txt").read_text().count("RuntimeError: the hundredth step breaks") == 2


EXPLODING = """
import gymnasium as gym
import toy_envs


class Exploding(toy_envs.Clock):
    steps = 0

    def step(self, action):
        Exploding.steps += 1
        observation, reward, *rest = super().step(action)
        return observation, float("nan") if Exploding.steps > 300 else reward, *rest


gym.register("Exploding-v0", entry_point=Exploding)
"""


def test_a_run_that_diverged_is_not_run_again_and_counts_as_a_random_policy(tmp_path, monkeypatch, capsys):
    """The script ends with the status 1 and rewards that are not finite after 320 of 1,024 steps."""
    (tmp_path / "exploding.py").write_text(EXPLODING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO / "tests"), str(tmp_path)]))
    path = write(tmp_path, ("toy_envs:Walk-v0", "exploding:Exploding-v0"), ("[1, 2]", "[1]"))
    monkeypatch.syspath_prepend(tmp_path)
    words = ["run", path, "--run-dir", str(tmp_path / "runs"), "--methods", "ppo"]
    assert command_line.main(words) == 0
    assert "done exploding_Exploding-v0__ppo__1, diverged" in " ".join(capsys.readouterr().out.split())
    folder = tmp_path / "runs" / "tiny" / "exploding_Exploding-v0__ppo__1"
    (attempt,) = json.loads((folder / "job.json").read_text())["attempts"]
    assert attempt["exit_code"] == 1 and launch.job_status(folder) == "finished"
    before = snapshot(tmp_path / "runs")
    assert command_line.main(words) == 0 and launch.attempt(folder) == 0
    assert snapshot(tmp_path / "runs").keys() == before.keys() and (folder / "exit_code").read_text() == "1\n"

    suite = load_suite(path, check=False)
    content = collect(suite, tmp_path / "runs", tmp_path / "results", allow_mixed=True)
    (run,) = content["runs"]
    assert run["diverged"] and run["wall_time_s"] is None and run["steps"] < 1024 and content["failed"] == []
    rows = read_csv(tmp_path / "results" / "tiny" / f"{folder.name}.csv")
    assert [row["global_step"] for row in rows] == ["256", "512", "768", "1024"] and rows[-1]["episodic_return"] == ""
    results = load_results(suite, tmp_path / "results")
    assert results.diverged == [folder.name]


def test_a_job_is_never_run_twice_at_once(tmp_path):
    suite = load_suite(write(tmp_path, *LONG))
    folder = launch.prepare(suite, tmp_path / "runs")[0]
    running = launch.Attempt(folder)
    try:
        assert launch.attempt(folder) == launch.ELSEWHERE
        with pytest.raises(launch.Elsewhere):
            launch.Attempt(folder)
    finally:
        running.process.kill()
        running.wait()
    assert launch.job_status(folder) == "failed"


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_of_another_process_takes_a_workers_place_and_cores(tmp_path, monkeypatch, workers):
    """As after a killed launcher: with one worker nothing is started beside its run, though it is of a job that is not chosen
    now; with two one run, on the other cores."""
    suite = load_suite(write(tmp_path, ("[1, 2]", "[1, 2, 3]")), check=False).only(("ppo",), (), ())
    folders = launch.prepare(suite, tmp_path / "runs")
    cores, beside = launch.split_cores(workers), []
    attempt = {"host": os.uname().nodename, "cores": cores[0], "resumed": False, "commit": None, "dirty": False}
    edit_json(folders[0] / "job.json", lambda made: made["attempts"].append(attempt))
    orphan = open(folders[0] / "lock", "w")
    launch.fcntl.flock(orphan, launch.fcntl.LOCK_EX)
    sleep = launch.time.sleep

    def look(seconds):
        """In place of the pause between two rounds of the launcher; the other process ends after 20."""
        if len(beside) < 20:
            beside.append([launch.job_status(folder) for folder in folders[1:]].count("running"))
            if len(beside) == 20:
                launch.fcntl.flock(orphan, launch.fcntl.LOCK_UN)
        sleep(seconds)

    monkeypatch.setattr(launch.time, "sleep", look)
    seeds = (2, 3) if workers == 1 else ()
    assert launch.run_local(suite.only((), (), seeds), tmp_path / "runs", workers) == 0
    orphan.close()
    attempts = [json.loads((folder / "job.json").read_text())["attempts"] for folder in folders]
    assert len(attempts[0]) == workers and all(launch.job_status(folder) == "finished" for folder in folders[1:])
    assert max(beside) == workers - 1
    assert workers == 1 or attempts[1][0]["cores"] == cores[1]
    assert all(each[-1]["load_at_start"] >= 0 and each[-1]["load_at_end"] >= 0 for each in attempts[1:])


# ---- Collect ---------------------------------------------------------------------------------------------------
def test_collect_bins_episodes_of_each_run_on_the_grid(launched, tmp_path):
    path, run_dir, _ = launched
    suite = load_suite(path, check=False)
    content = collect(suite, run_dir, tmp_path, allow_mixed=True)
    assert len(content["runs"]) == 4 and content["missing"] == []
    for job in suite.jobs():
        rows = read_csv(tmp_path / "tiny" / f"{job.name}.csv")
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
            assert "bilevel/cosine" not in rows[0]
    made = content["runs"][0]
    assert made["command"].startswith("python ppo_continuous.py --env-id toy_envs:Walk-v0 --seed 1") and made["commit"]
    assert made["versions"]["torch"] and made["wall_time_s"] > 0 and made["steps"] == 1024 and not made["diverged"]


@pytest.mark.parametrize(
    ("final_return", "losses", "said"),
    [
        (1.0, {"policy_loss": "0.1", "value_loss": "0.2", "approx_kl": ""}, False),
        (None, {"policy_loss": "0.1", "value_loss": "0.2"}, False),
        (9.0, {"policy_loss": "", "value_loss": "0.2"}, True),  # argmax of logits that are nan: returns stay finite
        (1.0, {"actor_loss": "inf", "qf_loss": "0.2"}, True),
        (1.0, {"actor_loss": "0.1", "qf_loss": ""}, True),
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
    more = write(tmp_path, ("[1, 2]", "[1, 2, 3]"))
    content = collect(load_suite(more, check=False), run_dir, tmp_path / "results", allow_mixed=True)
    assert content["missing"] == ["toy_envs_Walk-v0__ppo__3", "toy_envs_Walk-v0__blpo__3"]
    again = collect(load_suite(more, check=False), tmp_path / "nothing here", tmp_path / "results", allow_mixed=True)
    assert again["runs"] == content["runs"] and again["missing"] == content["missing"]
    fewer = load_suite(write(tmp_path, ("[1, 2]", "[2]")), check=False)
    assert len(collect(fewer, run_dir, tmp_path / "results", allow_mixed=True)["runs"]) == 2
    assert len(list((tmp_path / "results" / "tiny").glob("*.csv"))) == 2


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def clean(made: dict) -> None:
    """As if run from a committed tree, which the tree under test need not be."""
    for attempt in made["attempts"]:
        attempt["dirty"] = False


@pytest.fixture
def copied(launched, tmp_path):
    """A copy of the tiny suite's runs, of committed code."""
    subprocess.run(["cp", "-r", str(launched[1]), str(tmp_path / "runs")], check=True)
    for path in (tmp_path / "runs").glob("tiny/*/job.json"):
        edit_json(path, clean)
    return load_suite(launched[0], check=False), tmp_path / "runs"


def test_collect_refuses_mixed_commits_arguments_and_uncommitted_code(copied, tmp_path):
    suite, run_dir = copied
    results = tmp_path / "results"
    collect(suite, run_dir, results)
    first = run_dir / "tiny" / "toy_envs_Walk-v0__ppo__1"
    before, saved = snapshot(results), (first / "job.json").read_text()

    def refused(words: str) -> None:
        with pytest.raises(Mixed, match=words):
            collect(suite, run_dir, results)
        assert snapshot(results) == before
        assert collect(suite, run_dir, tmp_path / "other", allow_mixed=True)["mixed"]
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


def test_commands_are_compared_without_restated_arguments(copied, tmp_path):
    """The suite now says what was the default when the runs were made; another suite that takes the runs may say so as well."""
    suite, run_dir = copied
    said = ('script = "ppo_continuous.py"', 'script = "ppo_continuous.py"\narguments = { critic-learning-rate = 2.8e-3 }')
    with pytest.raises(Mixed, match="with other arguments than the suite's now .toy_envs_Walk-v0__ppo__1"):
        collect(load_suite(write(tmp_path, said), check=False), run_dir, tmp_path / "results")
    restated = write(tmp_path, said, ("grid = 256", 'grid = 256\nrestated = ["critic-learning-rate"]'))
    assert collect(load_suite(restated), run_dir, tmp_path / "results")["mixed"] == []
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
def test_a_run_that_was_started_by_hand_tells_where_it_came_from(made, commit, dirty, cpu):
    """In either form of args.json."""
    assert origin(made) == {"commit": commit, "dirty": dirty, "cpu": cpu, "gpu": None}


def test_collect_takes_a_run_that_was_started_by_hand(copied, tmp_path):
    suite, run_dir = copied
    folder = run_dir / "tiny" / "toy_envs_Walk-v0__ppo__1"
    edit_json(folder / "job.json", lambda made: made.update(attempts=[]))
    first = collect(suite, run_dir, tmp_path / "results", allow_mixed=True)["runs"][0]
    (run,) = launch.run_folders(folder)
    commit = json.loads((run / "args.json").read_text())["commit"]
    assert first["commit"] == commit.removesuffix("-dirty") and first["dirty"] == commit.endswith("-dirty")
    assert (first["attempts"], first["cpu"], first["cores"]) == (0, None, None)


def test_collect_on_the_command_line(copied, tmp_path, capsys):
    suite, run_dir = copied
    words = ["collect", str(suite.path), "--run-dir", str(run_dir), "--results", str(tmp_path / "results")]
    assert command_line.main(words) == 0
    assert capsys.readouterr().out == f"4 runs in {tmp_path / 'results' / 'tiny'}\n"
    assert tomllib.loads(suite.path.read_text())["seeds"] == [1, 2]


def test_collect_records_which_missing_jobs_failed_and_how_often_a_run_was_begun(copied, tmp_path):
    suite, run_dir = copied
    ppo, blpo, other = (run_dir / "tiny" / f"toy_envs_Walk-v0__{name}" for name in ("ppo__1", "blpo__1", "ppo__2"))
    for folder, code in ((ppo, 1), (blpo, 143)):  # that one was stopped and may go on
        (run,) = launch.run_folders(folder)
        edit_json(run / "result.json", lambda made: made.update(status="failed"))
        edit_json(folder / "job.json", lambda made, code=code: made["attempts"][-1].update(exit_code=code))
    edit_json(other / "job.json", lambda made: made["attempts"].insert(0, made["attempts"][0] | {"load_at_start": 99.5}))
    content = collect(suite, run_dir, tmp_path / "results")
    assert content["missing"] == [ppo.name, blpo.name] and content["failed"] == [ppo.name]
    runs = {run["job"]: run for run in content["runs"]}
    assert (runs[other.name]["attempts"], runs[other.name]["load"]) == (2, 99.5)
    again = collect(suite, tmp_path / "nothing here", tmp_path / "results")
    assert again["failed"] == [ppo.name] and again["runs"] == content["runs"]


def test_collect_works_without_git_and_removes_figures_of_earlier_csv_files(copied, tmp_path, monkeypatch):
    suite, run_dir = copied
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    for old in ("returns_steps.png", "returns_steps.pdf", "notes.txt"):
        (folder / old).touch()
    for path in run_dir.glob("tiny/*/job.json"):  # as if run where there was no git either
        edit_json(path, lambda made: made["attempts"][0].update(commit=None, dirty=None))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert blob("HEAD", "ppo_continuous.py") is None
    content = collect(suite, run_dir, tmp_path / "results")
    assert content["mixed"] == [] and {run["commit"] for run in content["runs"]} == {None}
    assert {path.name for path in folder.iterdir() if path.suffix != ".csv"} == {"runs.json", "notes.txt"}


# ---- Measurements ----------------------------------------------------------------------------------------------
def measure(module: str, code: str) -> str:
    """What a module of benchmark/ prints when this is done with it as `m`: in a process of its own, since it forks."""
    words = [sys.executable, "-c", f"import benchmark.{module} as m\nfrom pathlib import Path\n{code}"]
    done = subprocess.run(words, cwd=REPO, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
@pytest.mark.skipif(not (REPO / ".git").exists(), reason="needs a git checkout")
def test_this_tree_is_timed_against_a_commit(tmp_path):
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, text=True, capture_output=True).stdout.strip()
    trees = ["git", "worktree", "list"]
    before = subprocess.run(trees, cwd=REPO, capture_output=True).stdout
    args = f'm.Args(against="{commit}", env_id="InvertedPendulum-v4", rounds=2, output=Path("{tmp_path}"))'
    said = measure("speed", f'm.SHAPES = {{"8 x 256": ("", 4, 1)}}; m.main({args})')
    assert "BLPO, 8 x 256: " in said and "of the commit's steps/s" in said
    rows = read_csv(tmp_path / "against.csv")
    assert [(row["script"], row["tree"]) for row in rows] == [(script, tree) for script in ("PPO", "BLPO") for tree in (commit, "this tree")]
    assert all(0.1 < float(row["speed_vs_commit"]) < 10 for row in rows if row["tree"] == "this tree")
    assert float(rows[3]["update_s"]) > float(rows[3]["nested_critic_s"]) > 0 and rows[1]["nested_critic_s"] == ""
    assert json.loads((tmp_path / "against.json").read_text())["provenance"]["commit"] == commit
    assert subprocess.run(trees, cwd=REPO, capture_output=True).stdout == before


@pytest.mark.full
def test_loops_and_solvers_are_timed(tmp_path):
    args = f'm.Args(env_id="InvertedPendulum-v4", rounds=1, output=Path("{tmp_path}"))'
    measure("speed", f'm.SHAPES = {{"8 x 256": ("", 4, 1)}}; m.ROWS = {{"128": ""}}; m.main({args})')
    loops, solvers = (read_csv(tmp_path / f"{part}.csv") for part in ("training", "solvers"))
    assert [row["loop"] for row in loops[:2]] == ["PPO", "reference PPO"] and len(loops) == 7
    assert all(float(row["ms"]) > 0 for row in solvers)
    left = {(row["solver"], float(row["damping"])): float(row["relative_residual"]) for row in solvers}
    assert left["exact", 1.0] < 1e-4 and left["cg 50", 1.0] < 1e-4 < left["cg 2", 1.0]


@pytest.mark.full
def test_the_study_of_directions_and_damping(tmp_path):
    args = f'm.Args(("InvertedPendulum-v4",), 4096, (1, 2), results_dir=Path("{tmp_path}"))'
    measure("ihvp_study", f"m.main({args})")
    rows = read_csv(tmp_path / "residuals.csv")
    assert {row["iteration"] for row in rows} == {"1", "2"} and {row["solver"] for row in rows} >= {"exact", "features", "krylov"}
    assert max(float(row["residual"]) for row in rows if row["solver"] == "exact") < 1e-3
    assert json.loads((tmp_path / "study.json").read_text())["commit"]
