"""benchmark/studies: turns, tables, refusals, and each study at a tiny size."""

import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import REPO, environment, read_csv

import blpo_continuous as blpo
import stddpg
from benchmark.data import Results
from benchmark.reference import load_reference
from benchmark.studies import (
    ihvp_study,
    sobirl_convergence,
    speed,
    speed_atari,
    speed_sobirl,
    speed_stackelberg,
    stac_step_sizes,
    stackelberg_damping,
    study,
    turns,
)


# ---- Turns and tables --------------------------------------------------------------------------------------
def test_turns_alternate_and_the_order_turns_around():
    calls = []

    def call(name):
        calls.append(name)
        return {"s": float(len(calls))}

    samples = turns.in_turns({name: partial(call, name) for name in "ABC"}, 3)
    assert "".join(calls) == "ABCCBAABC"
    assert samples == {"A": {"s": [1, 6, 7]}, "B": {"s": [2, 5, 8]}, "C": {"s": [3, 4, 9]}}


def test_ratios_are_of_a_step_and_taken_within_a_turn():
    """The second loop makes twice the steps in twice the time, and in the second turn three times."""
    first = {"steps": [10, 10], "rollout": [1, 10], "cpu": [1, 10], "update": [0.5, 5], "env": [0.5, 5]}
    second = {"steps": [20, 20], "rollout": [2, 60], "cpu": [2, 20], "update": [1, 10], "env": [1, 50]}
    rows = turns.loop_rows({"one": first, "two": second}, lambda _: {"one": "one"}, task="t")
    assert [row["task"] for row in rows] == ["t", "t"] and rows[0]["time_over_one"] == [1, 1]
    assert rows[1]["time_over_one"] == [1, 3] and rows[1]["cpu_over_one"] == rows[1]["update_over_one"] == [
        1,
        1,
    ]
    assert rows[1]["steps_per_s"] == pytest.approx([10, 1 / 3]) and rows[1]["env_ms"] == [50, 2500]


def two_loops(rollout_done):
    """Rollouts that tell their number."""
    for number in range(100):
        rollout_done({"steps": 1, "number": number})


def test_every_loop_is_warmed_up_and_a_turn_is_a_mean():
    samples = turns.loops_in_turns({"A": two_loops, "B": two_loops}, rounds=2, rollouts=2, warmup=3)
    assert samples["A"]["number"] == samples["B"]["number"] == [3.5, 5.5]
    assert all(seconds > 0 for seconds in samples["A"]["rollout"])


def test_a_loop_that_ends_too_early_is_bad_input():
    with pytest.raises(study.BadInput, match="A has made all its steps; ask for fewer --rounds"):
        turns.loops_in_turns({"A": two_loops}, rounds=100)


def test_a_script_that_refuses_its_arguments_is_bad_input():
    loop = partial(turns.script_loop, "ppo_continuous.py", "--env-id Hopper-v4 --num-envs 0")
    with pytest.raises(study.BadInput, match="^A: --num-envs is "):
        turns.loops_in_turns({"A": loop}, 1)


def test_a_table_has_medians_and_ranges():
    rows = [
        {"loop": "a, b", "s": [1.0, 4.0, 2.0]},
        {"loop": "c", "s": [1234567.0, 0.5, 2.0], "more": math.nan},
    ]
    files = study.files_of("t", rows, {"commit": "c"})
    assert files["t.csv"] == b'loop,s,s_min,s_max,more\n"a, b",2,1,4,\nc,2,0.5,1.23457e+06,\n'
    assert json.loads(files["t.json"])["rows"][0] == rows[0] and len(files) == 2
    assert "rows" not in json.loads(study.files_of("t", [{"s": 1.0}], {})["t.json"])  # the csv file has them
    words = {"2 (1..4)": [1.0, 4.0, 2.0], "0.123": [0.1234], "1,234": 1234.5, "nan": math.nan, "w": "w"}
    assert [study.cell(each) for each in words.values()] == list(words)


def test_a_folder_that_cannot_be_written_in_the_end_keeps_its_files(tmp_path, monkeypatch, capsys):
    def measure(args):
        yield "a", [{"s": 1.0}]
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        yield "a", [{"s": 2.0}]

    with pytest.raises(study.BadInput, match=f"^--results-dir {tmp_path}: No space left"):
        study.run(study.Args(results_dir=tmp_path), measure, "made_up.py")
    assert (tmp_path / "a.csv").read_text() == "s\n1\n" and "| 2 |" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", "a.json"}


def test_a_long_table_is_written_and_not_printed(tmp_path, capsys):
    study.run(study.Args(results_dir=tmp_path), lambda _: [("long", [{"s": 1.0}] * 101)], "made_up.py")
    assert len(read_csv(tmp_path / "long.csv")) == 101 and "| s |" not in capsys.readouterr().out


# ---- Bad input ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "module, words, sentence",
    [
        (speed, "--rounds 0", "--rounds is 0: Input should be greater than or equal to 1"),
        (speed, "--against=-x", "--against is '-x': String should match pattern"),
        (speed, "--against nope --rounds 1", "--against nope: fatal: invalid reference: nope"),
        (speed, "--env-id nope --parts solvers", "--env-id 'nope' cannot be made"),
        (speed_stackelberg, "--device cuda", "--device cuda: PyTorch finds no CUDA device"),
        (speed_stackelberg, "--scripts", "--scripts is (): Tuple should have at least 1 item"),
        (speed_sobirl, "--env-id nope --rounds 1", "ground-truth: --env-id 'nope' cannot be made"),
        (speed_atari, "--env-id nope --rounds 1", "--env-id"),
        (speed_sobirl, "--results-dir {file}/folder", "--results-dir {file}/folder: Not a directory"),
        (ihvp_study, "--seed -1", "--seed is -1: "),
        (ihvp_study, "--total-timesteps 4096 --iterations 1 3", "--iterations 3: the run has 2 rollouts"),
        (stackelberg_damping, "--steps 999", "--steps is 999: "),
        (stackelberg_damping, "--env-ids nope", "--env-id 'nope' cannot be made"),
        (sobirl_convergence, "--instances 1", "--instances is 1: "),
        (sobirl_convergence, "--ladder 64", "--ladder is (64,): "),
        (sobirl_convergence, "--ladder 64 64", "--ladder is (64, 64): it must be two numbers or more"),
        (stac_step_sizes, "--results {file}-missing", "72 runs of stac_mujoco_tune are missing"),
        (stac_step_sizes, "--results {file}", "{file}/stac_mujoco_tune"),
        (stac_step_sizes, "--results {damaged}", "{damaged}/stac_mujoco_tune/runs.json"),
    ],
)
def test_bad_input_is_one_sentence(module, words, sentence, tmp_path, monkeypatch, capsys):
    """Exit status 2, nothing on the disk."""
    places = {"file": tmp_path / "file", "damaged": tmp_path / "damaged"}
    places["file"].write_text("")
    (places["damaged"] / "stac_mujoco_tune").mkdir(parents=True)
    (places["damaged"] / "stac_mujoco_tune" / "runs.json").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["study", *words.format(**places).split()])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        study.command(module.Args, module.measure, module.__file__, module.__doc__)
    signal.signal(signal.SIGTERM, handler)
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and said[-1].startswith("error: ") and sentence.format(**places) in said[-1]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["speed", "speed_atari", "stac_step_sizes"])
def test_an_unknown_word_ends_with_status_2(name):
    words = [sys.executable, "-m", f"benchmark.studies.{name}", "nope"]
    done = subprocess.run(words, cwd=REPO, env=environment(), text=True, capture_output=True)
    assert done.returncode == 2 and "nope" in done.stderr and "Traceback" not in done.stderr


# ---- The studies of speed ----------------------------------------------------------------------------------
def run(module, args) -> None:
    """The study in this process."""
    study.run(args, module.measure, module.__file__)


def measure(module: str, folder: Path, words: str, code: str = "") -> str:
    """What a study prints that is called with these words: in a process of its own, since it forks."""
    lines = f"import benchmark.studies.{module} as m\nfrom benchmark.studies import study\n{code}"
    lines += "\nstudy.command(m.Args, m.measure, m.__file__, '')"
    argv = [sys.executable, "-c", lines, "--results-dir", str(folder), *words.split()]
    done = subprocess.run(argv, cwd=REPO, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


SMALL = 'm.SHAPES = {"8 x 256": ("", 1)}; m.ROWS = {"2048": ""}'


@pytest.mark.full
@pytest.mark.skipif(not (REPO / ".git").exists(), reason="needs a git checkout")
def test_this_tree_is_timed_against_a_commit(tmp_path):
    git = partial(subprocess.check_output, cwd=REPO, text=True)
    commit, before = git(["git", "rev-parse", "HEAD"]).strip(), git(["git", "worktree", "list"]).count("\n")
    said = measure("speed", tmp_path, f"--against {commit} --env-id InvertedPendulum-v4 --rounds 2", SMALL)
    rows = read_csv(tmp_path / "against.csv")
    names = [f"{script}, {tree}" for script in ("PPO", "BLPO") for tree in (commit, "this tree")]
    assert [row["loop"] for row in rows] == names and all(name in said for name in names)
    assert all(0.1 < float(row["time_over_commit"]) < 10 for row in rows)
    assert float(rows[3]["update_ms"]) > float(rows[3]["nested_critic_ms"]) > 0
    assert rows[1]["nested_critic_ms"] == ""
    assert json.loads((tmp_path / "against.json").read_text())["provenance"]["commit"] == commit
    assert git(["git", "worktree", "list"]).count("\n") == before


@pytest.mark.full
def test_loops_and_solvers_are_timed(tmp_path):
    measure("speed", tmp_path, "--env-id InvertedPendulum-v4 --rounds 1", SMALL)
    loops, solvers = (read_csv(tmp_path / f"{part}.csv") for part in ("training", "solvers"))
    assert [row["loop"] for row in loops[:2]] == ["PPO", "reference PPO"] and len(loops) == 6
    assert all(float(row["ms"]) > 0 for row in solvers)
    left = {(row["solver"], float(row["damping"])): float(row["relative_residual"]) for row in solvers}
    assert left["cg 50", 1.0] < 1e-4 < left["cg 2", 1.0]


@pytest.mark.full
def test_atari_loops_are_timed(tmp_path):
    measure("speed_atari", tmp_path, "--rounds 1 --torch-threads 1", 'm.MORE = "--num-steps 32"')
    rows = read_csv(tmp_path / "loops.csv")
    names = "games only; PPO; reference, 1 threads; PPO separate; BLPO head, nystrom; BLPO head, none".split(
        "; "
    )
    assert [row["loop"] for row in rows] == names and float(rows[3]["time_over_PPO_separate"]) == 1


def test_the_reference_of_speed_sobirl_trains(monkeypatch):
    """Three turns of 30 steps, of which the first is random."""
    monkeypatch.setattr(speed_sobirl, "STEPS", 30)
    monkeypatch.setattr(speed_sobirl, "RANDOM_TURNS", 1)
    told = []

    def rollout_done(numbers):
        told.append(numbers)
        if len(told) == 3:
            raise StopIteration

    with pytest.raises(StopIteration):
        speed_sobirl.reference_loop("Hopper-v4", 1, rollout_done)
    assert all(each["env"] > 0 and each["update"] > 0 and each["steps"] == 30 for each in told)


def test_every_update_is_timed(tmp_path):
    measure("speed_stackelberg", tmp_path, "--scripts stddpg.py --rounds 1 --num-steps 5")
    rows = read_csv(tmp_path / "speed_stackelberg.csv")
    assert [row["loop"] for row in rows] == list(speed_stackelberg.COMPETITORS)
    assert float(rows[0]["update_over_plain"]) == 1 and all(float(row["update_ms"]) > 0 for row in rows)
    content = json.loads((tmp_path / "speed_stackelberg.json").read_text())
    assert "load_average" in content["provenance"] and len(content["rows"]) == len(rows)


def test_the_timed_solve_makes_all_its_iterations():
    """Also where the residual is already small."""
    products, solver = [], SimpleNamespace(conjugate_gradient=stddpg.conjugate_gradient)
    speed_stackelberg.all_iterations(solver)

    def product(vector):
        products.append(vector)
        return vector * torch.linspace(1, 2, 50)

    counts = []
    for solve in (stddpg.conjugate_gradient, solver.conjugate_gradient):
        products.clear()
        solve(product, torch.ones(50), 10)
        counts.append(len(products))
    assert counts[0] < 10 == counts[1]


# ---- The other studies -------------------------------------------------------------------------------------
def test_the_study_of_directions_prints_and_writes_only_when_asked(tmp_path, monkeypatch, capsys):
    """On one small system; the exact solve leaves nothing."""
    torch.manual_seed(0)
    jacobian = blpo.CriticJacobian(blpo.Agent(3, 1).critic, torch.randn(12, 3))
    system = 5, blpo.GaussNewton(jacobian, torch.full((12,), 1 / 12)), torch.randn(12) / 12
    monkeypatch.setattr(ihvp_study, "captured_systems", lambda *_: [system])
    monkeypatch.chdir(tmp_path)
    run(ihvp_study, ihvp_study.Args(env_ids=("Hopper-v4",)))
    assert "| damping | exact |" in capsys.readouterr().out and not list(tmp_path.iterdir())
    run(ihvp_study, ihvp_study.Args(env_ids=("Hopper-v4",), results_dir=tmp_path / "study"))
    assert {path.name for path in (tmp_path / "study").iterdir()} == {
        "residuals.csv", "residuals.json", "largest.csv", "largest.json",
    }  # fmt: skip
    rows = read_csv(tmp_path / "study" / "residuals.csv")
    exact = [float(row["residual"]) for row in rows if row["solver"] == "exact"]
    assert len(exact) == len(ihvp_study.DAMPINGS) and max(exact) < 1e-3


@pytest.mark.full
def test_the_study_of_directions_captures_real_systems(tmp_path):
    args = ihvp_study.Args(
        env_ids=("InvertedPendulum-v4",), total_timesteps=4096, iterations=(1, 2), results_dir=tmp_path
    )
    run(ihvp_study, args)
    rows = read_csv(tmp_path / "residuals.csv")
    assert {row["iteration"] for row in rows} == {"1", "2"} and {"exact", "features"} < {
        row["solver"] for row in rows
    }
    assert max(float(row["residual"]) for row in rows if row["solver"] == "exact") < 1e-3


def test_the_study_of_lambda(tmp_path):
    words = {"scripts": ("stddpg.py",), "env_ids": ("Hopper-v4",), "steps": 1000, "batches": 2}
    run(stackelberg_damping, stackelberg_damping.Args(results_dir=tmp_path, **words))
    rows = {(row["solve"], float(row["lambda"])): row for row in read_csv(tmp_path / "solves.csv")}
    assert list(rows) == stackelberg_damping.SOLVES
    residuals = [float(rows["actor, kernel", each]["residual"]) for each in (1e-2, 1.0, 100.0)]
    assert 1 > residuals[0] > residuals[1] > residuals[2] > 0 and rows["critic, cg", 0.0]["weight"] == ""
    assert float(rows["actor, kernel", 1.0]["largest"]) >= residuals[1]


def test_exponents_of_known_powers():
    """Two instances that fall as K^-1 and as K^-0.5, after a start that is not fitted; samples grow as
    K^(7/3)."""
    m_sobirl, _, _, growing = sobirl_convergence.SETTINGS
    rows = [
        {"setting": setting, "problem": "p", "seed": seed, "iterations": k, "samples": k ** (7 / 3)}
        | {"average_squared_norm": 3.0 if k < 8 and setting == m_sobirl else 5 * k**power}
        for setting in (m_sobirl, growing)
        for seed, power in ((1, -1.0), (2, -0.5))
        for k in (1, 2, 8, 16, 32)
    ]
    first, iterations, samples = sobirl_convergence.exponents(rows)
    assert (first["theorem"], iterations["theorem"], samples["theorem"]) == (-1, -2 / 3, -2 / 7)
    for row, factor in ((first, 1), (iterations, 1), (samples, 3 / 7)):
        assert (row["smallest"], row["largest"]) == pytest.approx((-factor, -0.5 * factor))
        assert row["slope"] == pytest.approx(-0.75 * factor) and row["instances"] == 2
        half = (
            12.7062 * 0.25 * factor
        )  # t with one degree of freedom; the standard error of -1 and -1/2 is 1/4
        assert (row["low"], row["high"]) == pytest.approx(
            (-0.75 * factor - half, -0.75 * factor + half), rel=1e-4
        )


def test_a_tiny_run_of_the_convergence_writes_every_file(tmp_path, capsys):
    words = {
        "tracking_iterations": 4,
        "iterations": 4,
        "stochastic_iterations": 4,
        "ladder": (2, 4),
        "instances": 2,
    }
    run(sobirl_convergence, sobirl_convergence.Args(results_dir=tmp_path, **words))
    files = {"curves.csv", "curves.json", "exponents.csv", "exponents.json", "convergence.png"}
    assert {
        path.name for path in tmp_path.iterdir()
    } == files and "goal-navigation" in capsys.readouterr().out
    found = read_csv(tmp_path / "exponents.csv")
    assert len(found) == 2 * 6 + 2 * 2 * 4 and all(math.isfinite(float(row["slope"])) for row in found)
    rows = [
        row for row in read_csv(tmp_path / "curves.csv") if "growing" in row["setting"] and row["seed"] == "1"
    ]
    assert [(row["iterations"], row["samples"]) for row in rows[:2]] == [
        ("2", "8"),
        ("4", "40"),
    ]  # 4 and 10 tuples


# ---- The rule of the step sizes ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "of_blpo, order, ranks",
    [
        ((0.1, 0.3), ["nested", "ppo", "blpo"], [1.5, 2, 2.5]),
        ((0.1, 0.1), ["nested", "ppo", "blpo"], [1.5, 1.5, 3]),  # of equal mean ranks the higher return
        ((0.9, 0.95), ["blpo", "nested", "ppo"], [1, 2.5, 2.5]),
    ],
)
def test_the_best_mean_rank_comes_first(of_blpo, order, ranks):
    wanted, levels, rows = {"ppo": (0.5, 0.2), "nested": (0.4, 0.9), "blpo": of_blpo}, load_reference(), []
    tasks = ("Hopper-v4", "HalfCheetah-v4")
    for (method, of_tasks), seed in ((each, seed) for each in wanted.items() for seed in (1, 2)):
        for task, score in zip(tasks, of_tasks):
            zero, one = (levels[task][key] for key in ("random", "reference"))
            final = zero + (one - zero) * (score + (0.01 if seed == 1 else -0.01))
            rows.append({"method": method, "environment": task, "seed": seed, "final_return": final})
    methods = {name: SimpleNamespace(label=name, script="ppo_continuous.py") for name in wanted}
    suite = SimpleNamespace(name="s", methods=methods, environments=tasks)
    ranking = stac_step_sizes.ranking(suite, Results(pd.DataFrame(rows), pd.DataFrame()))
    assert [row["method"] for row in ranking] == order and [row["mean rank"] for row in ranking] == ranks
    best = sum(wanted[order[0]]) / 2
    assert ranking[0]["mean normalised return"] == pytest.approx(best)
