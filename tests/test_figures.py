"""benchmark/figures.py on synthetic results: bitwise repeatable, every n in a legend, one colour a method."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmark import figures, reference, scores
from benchmark.reference import load_reference
from benchmark.suites import Method, Suite, known_suites, load_suite

LABELS = {
    "ppo": "PPO", "nested": "nested control", "blpo": "BLPO", "blpo-cg": "BLPO, conjugate gradient", "authors": "released code",
    "blpo-exact": "BLPO, exact solve", "ppo-critic-lr": "PPO, critic's step size", "ppo-equal-steps": "PPO, equal critic steps",
    "permuted": "permuted weights", "something-new": "something new",
}  # fmt: skip
ENVIRONMENTS = (
    "Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Humanoid-v4", "Reacher-v4", "Pusher-v4", "InvertedDoublePendulum-v4",
)  # fmt: skip
LEVELS = {name: (entry["random"], entry["reference"]) for name, entry in load_reference().items()}


def make_suite(methods: int = 3, environments: int = 2, seeds: int = 3, **changes) -> Suite:
    """A suite of the first so many methods and environments."""
    names, tasks = list(LABELS)[:methods], ENVIRONMENTS[:environments]
    table = {
        name: Method(name, LABELS[name], "ppo_continuous.py", {}, tasks, tuple(range(1, seeds + 1))) for name in names
    }
    values = {
        "name": "synthetic", "path": Path("synthetic.toml"), "description": "Made up.", "environments": tasks, "methods": table,
        "grid": 1000, "diagnostics": (), "workers": None, "baselines": ("ppo",), "aggregate": True, "claims": (),
    }  # fmt: skip
    return Suite(**(values | changes))


def make_results(suite: Suite, folder: Path, better=(), slower=(), leave_out=(), points: int = 12, noise: float = 0.1) -> None:
    """Write runs.json and the csv files; methods gain 0.15 of the reference level by their place, `better` ones 1 more."""
    (folder / suite.name).mkdir(parents=True)
    runs, missing = [], []
    for number, job in enumerate(suite.jobs()):
        if job.name in leave_out:
            missing.append(job.name)
            continue
        draw = np.random.default_rng(number)
        place = list(suite.methods).index(job.method)
        zero, one = LEVELS[job.environment]
        level = 0.7 + 0.15 * (place % 3) + (job.method in better) + noise * draw.normal()
        steps = np.arange(1, points + 1) * suite.grid
        curve = zero + (one - zero) * (level * (1 - np.exp(-4 * steps / steps[-1])) + 0.3 * noise * draw.normal(size=points))
        seconds = 100 * (1 + 0.1 * place + (job.method in slower)) * (1 + 0.05 * draw.random())
        with open(folder / suite.name / f"{job.name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["global_step", "wall_time_s", "episodic_return", "episodes"])
            for index, (step, value) in enumerate(zip(steps, curve)):
                empty = index == 0 or index % 7 == number % 7
                writer.writerow([step, seconds * (index + 1) / points, "" if empty else value, 0 if empty else 3])
        runs.append({
            "job": job.name, "method": job.method, "environment": job.environment, "seed": job.seed, "script": job.script,
            "command": " ".join(["python", *job.command]), "commit": "0123456789abcdef", "dirty": False, "versions": {"torch": "2.13.0"},
            "cpu": "a processor", "gpu": None, "final_return": float(zero + (one - zero) * level), "wall_time_s": seconds,
            "steps": int(steps[-1]),
        })  # fmt: skip
    table = {"suite": suite.name, "runs": runs, "missing": missing}
    (folder / suite.name / "runs.json").write_text(json.dumps(table))


def drawn(suite: Suite, folder: Path) -> dict:
    """The figures of the suite's results, not saved."""
    return figures.figures(suite, scores.load_results(suite, folder))


def texts(figure) -> list[str]:
    """The entries of the figure's legend."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.full
def test_two_plots_have_the_same_bytes(tmp_path):
    suite = make_suite(methods=2, seeds=2)
    make_results(suite, tmp_path)
    first = {path.name: path.read_bytes() for path in figures.plot(suite, tmp_path)}
    again = {path.name: path.read_bytes() for path in figures.plot(suite, tmp_path)}
    kinds = ("returns_steps", "returns_minutes", "aggregate", "profile", "improvement", "runtime")
    assert set(first) == {f"{kind}.{suffix}" for kind in kinds for suffix in ("png", "pdf")}
    assert first == again
    for name, content in first.items():
        for word in (b"CreationDate", b"Matplotlib", b"/Producer"):
            assert word not in content, f"{name} says {word}"


def test_every_method_and_its_n_is_in_a_legend(tmp_path):
    suite = make_suite(methods=4, seeds=3)
    make_results(suite, tmp_path, leave_out=("Hopper-v4__blpo__2",))
    expected = {f"{LABELS[each]} (n={'2-3' if each == 'blpo' else 3})" for each in suite.methods}
    made = drawn(suite, tmp_path)
    (rows,) = made.pop("improvement").axes
    assert {text.get_text() for text in rows.get_yticklabels()} == expected - {"PPO (n=3)"}
    assert rows.get_xlabel() == "P(above PPO, n=3)"
    for name, figure in made.items():
        assert {text.replace(" = 1", "") for text in texts(figure)} == expected, name


def colour(handle) -> tuple:
    """The colour of a line of a legend, or of a bar."""
    return figures.matplotlib.colors.to_rgb(handle.get_color() if hasattr(handle, "get_color") else handle.get_facecolor())


def test_a_method_has_one_colour_in_all_figures_and_suites(tmp_path):
    seen: dict[str, set] = {}
    for methods in (3, 10):
        suite = make_suite(methods=methods, seeds=2)
        make_results(suite, tmp_path / str(methods))
        made = drawn(suite, tmp_path / str(methods))
        rows = made.pop("improvement").axes[0]
        for text, line in zip(rows.get_yticklabels(), rows.lines[::2]):  # a bar and its dot, for each method
            seen.setdefault(text.get_text().split(" (")[0], set()).add(colour(line))
        for figure in made.values():
            for text, handle in zip(texts(figure), figure.legends[0].legend_handles):
                seen.setdefault(text.split(" (")[0].replace(" = 1", ""), set()).add(colour(handle))
    assert set(seen) == set(LABELS.values())
    assert all(len(colours) == 1 for colours in seen.values()), seen


def test_no_two_methods_of_a_suite_look_the_same():
    names = ["ppo", "nested", "blpo", *(f"unknown-{index}" for index in range(len(figures.FALLBACKS)))]
    table = {name: Method(name, name, "ppo_continuous.py", {}, ENVIRONMENTS[:1], (1,)) for name in names}
    suites = [dataclasses.replace(make_suite(), methods=table), *(load_suite(name, check=False) for name in known_suites())]
    for suite in suites:
        looks = figures.styles(suite)
        assert len(set(looks.values())) == len(suite.methods), suite.name


def test_a_diverged_run_counts_as_a_random_policy(tmp_path):
    suite = make_suite(environments=1)
    make_results(suite, tmp_path)
    name = "Hopper-v4__blpo__2"
    path = tmp_path / suite.name / "runs.json"
    made = json.loads(path.read_text())
    for run in made["runs"]:
        if run["job"] == name:
            run |= {"diverged": True, "final_return": math.nan}
    path.write_text(json.dumps(made))
    table = tmp_path / suite.name / f"{name}.csv"
    rows = list(csv.reader(table.open()))
    for row in rows[8:]:
        row[2] = "nan"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    results = scores.load_results(suite, tmp_path)
    random = LEVELS["Hopper-v4"][0]
    assert results.diverged == [name]
    returns = scores.final_returns(results, "blpo", "Hopper-v4")
    assert len(returns) == 3 and returns[1] == random != returns[0]
    curve = results.curves[name]["episodic_return"]
    assert np.array_equal(curve[-5:], np.full(5, random)) and np.isfinite(curve[1:]).all() and curve[3] != random


@pytest.mark.parametrize(
    "changes", [{"environments": 1}, {"methods": 1}, {"seeds": 1}, {"baselines": ()}, {"aggregate": False}]
)
def test_small_suites_have_the_figures_that_make_sense(tmp_path, changes):
    suite = make_suite(**changes)
    make_results(suite, tmp_path)
    made = set(drawn(suite, tmp_path))
    assert {"returns_steps", "returns_minutes"} <= made
    assert ("profile" in made) == (suite.aggregate and len(suite.environments) > 1)
    assert ("runtime" in made) == (len(suite.methods) > 1 and bool(suite.baselines))
    assert ("improvement" in made) == ("profile" in made and "runtime" in made)


def test_without_results_there_are_no_figures(tmp_path):
    suite = make_suite()
    assert figures.plot(suite, tmp_path) == []
    assert scores.load_results(suite, tmp_path).missing == [job.name for job in suite.jobs()]


def test_a_method_without_runs_on_an_environment_is_not_pooled(tmp_path):
    suite = make_suite(seeds=1)
    make_results(suite, tmp_path, leave_out=("Hopper-v4__blpo__1",))
    assert scores.pooled_methods(suite, scores.load_results(suite, tmp_path)) == ["ppo", "nested"]


def test_empty_bins_carry_the_last_value(tmp_path):
    path = tmp_path / "curve.csv"
    path.write_text("global_step,wall_time_s,episodic_return,episodes\n10,1,,0\n20,2,5.0,1\n30,3,,0\n40,4,7.0,2\n")
    np.testing.assert_array_equal(scores.load_curve(path)["episodic_return"], [np.nan, 5, 5, 7])


def test_curves_share_the_steps_and_minutes_that_every_run_has():
    one = {"global_step": np.array([10.0, 20, 30, 40]), "wall_time_s": np.array([60.0, 120, 180, 240])}
    one["episodic_return"] = np.array([np.nan, 1.0, 2, 3])
    other = {"global_step": np.array([10.0, 25, 35]), "wall_time_s": np.array([30.0, 60, 180])}
    other["episodic_return"] = np.array([4.0, 5, 6])
    steps, returns = figures.on_steps([one, other])
    assert steps.tolist() == [20, 25, 30, 35]
    assert returns.tolist() == [[1, 1, 2, 2], [4, 5, 5, 6]]
    minutes, returns = figures.on_minutes([one, other])
    assert (minutes[0], minutes[-1]) == (2.0, 3.0)
    assert returns[:, 0].tolist() == [1.0, 5.5] and returns[:, -1].tolist() == [2.0, 6.0]


def test_returns_against_labels(tmp_path):
    """Of the methods that use labels alone; the return at a number of labels is the last one before more were asked for."""
    one = {"global_step": np.array([10.0, 20, 30, 40]), "episodic_return": np.array([np.nan, 1.0, 2, 3])}
    other = {"global_step": np.array([10.0, 20, 30]), "episodic_return": np.array([4.0, 5, 6])}
    one[figures.LABELS], other[figures.LABELS] = np.array([0.0, 5, 5, 9]), np.array([np.nan, 5, 7])
    labels, returns = figures.on_labels([one, other])
    assert labels.tolist() == [5, 7] and returns.tolist() == [[2, 2], [5, 6]]

    suite = make_suite(seeds=2, environments=1, diagnostics=(figures.LABELS,))
    make_results(suite, tmp_path)
    assert "returns_labels" not in drawn(suite, tmp_path)
    for path in (tmp_path / suite.name).glob("*.csv"):
        lines = path.read_text().splitlines()
        labels = [f"{10 * index * ('__ppo__' not in path.name)}" for index in range(len(lines) - 1)]
        path.write_text("\n".join(",".join(pair) for pair in zip(lines, [figures.LABELS, *labels])) + "\n")
    made = drawn(suite, tmp_path)["returns_labels"]
    assert {text.split(" (")[0] for text in texts(made)} == {"nested control", "BLPO"}
    assert made.axes[0].get_xlabel() == "labels asked for" and made.axes[0].get_lines()[0].get_xdata()[-1] == 110


def test_a_suite_names_the_methods_that_its_figures_show(tmp_path):
    suite = make_suite(methods=4, baselines=("nested", "ppo"), figures=("blpo", "ppo"))
    make_results(suite, tmp_path)
    made = drawn(suite, tmp_path)
    assert [text.get_text() for text in made.pop("improvement").axes[0].get_yticklabels()] == ["BLPO (n=3)"]
    for name, figure in made.items():
        assert {text.replace(" = 1", "") for text in texts(figure)} == {"PPO (n=3)", "BLPO (n=3)"}, name
    assert set(made) == {"returns_steps", "returns_minutes", "aggregate", "profile", "runtime"}


@pytest.mark.full
def test_the_legend_stays_inside_the_figure_and_below_three_tenths_of_it(tmp_path):
    for methods in (4, 8):
        suite = make_suite(methods=methods, seeds=2)
        long = dataclasses.replace(suite.methods["nested"], label="one-step leader, trajectory term")
        suite = dataclasses.replace(suite, methods=suite.methods | {"nested": long})
        make_results(suite, tmp_path / str(methods))
        for name, figure in drawn(suite, tmp_path / str(methods)).items():
            if name == "improvement":
                continue
            figure.draw_without_rendering()
            box, (width, height) = figure.legends[0].get_window_extent(), figure.get_size_inches() * figure.dpi
            assert 0 <= box.x0 and box.x1 <= width and box.height < 0.3 * height, (name, methods, box.height / height)


@pytest.mark.full
def test_plot_removes_the_figures_that_it_no_longer_draws(tmp_path):
    suite = make_suite(methods=2, seeds=2, environments=1)
    make_results(suite, tmp_path)
    for old in ("profile.png", "profile.pdf", "notes.txt"):
        (tmp_path / suite.name / old).touch()
    written = figures.plot(suite, tmp_path)
    assert {path.name for path in (tmp_path / suite.name).iterdir() if path.suffix not in (".csv", ".json")} == {
        "notes.txt", *(path.name for path in written),
    }  # fmt: skip


def test_the_scale_of_the_scores_is_written_only_when_asked(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "reference.json"
    table = json.loads(reference.REFERENCE.read_text())
    copy.write_text(json.dumps(table))
    monkeypatch.setattr(reference, "REFERENCE", copy)
    monkeypatch.setattr(reference, "random_returns", lambda *_: (np.array([-7.0, -9.0]), "made up"))
    reference.measure(reference.Args(episodes=2))
    assert json.loads(copy.read_text()) == table and "Hopper-v4 -8.0\n" in capsys.readouterr().out
    reference.measure(reference.Args(episodes=2, write=True))
    assert json.loads(copy.read_text())["environments"]["Hopper-v4"]["random"] == -8.0
