"""benchmark/claims.py and report.py on synthetic results: the verdicts, every table, what is disclosed, and identical bytes."""

import dataclasses
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
from test_figures import ENVIRONMENTS, make_results, make_suite

from benchmark import claims, figures, markdown, report, scores, statistics
from benchmark.reference import load_reference, normalise
from benchmark.suites import RESULTS, ROOT, Claim, Dead, Gate, known_suites, load_suite

RETURN = Claim("BLPO at least as good as PPO", "blpo", "ppo")
ABOVE = Claim("BLPO above PPO", "blpo", "ppo", "above")
TIME = Claim("BLPO takes less time than PPO", "blpo", "ppo", "time")


def page(suites, folder, out=None) -> str:
    """What the report says of the results in that folder; it is written beside them, or to `out`."""
    out = out or folder / "results.md"
    report.report(suites, folder, out)
    return out.read_text()


def edit(suite, folder, change) -> None:
    """Change the content of the suite's runs.json."""
    path = folder / suite.name / "runs.json"
    made = json.loads(path.read_text())
    change(made)
    path.write_text(json.dumps(made))


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the tables between a heading and the next one."""
    section = text.split(f"{heading}\n", 1)[1].split("\n#")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]


def judge(suite, folder, claim) -> claims.Verdict:
    return claims.verdict(suite, scores.load_results(suite, folder), claim, load_reference())


@pytest.mark.parametrize(
    "better, noise, said",
    [(("blpo",), 0.05, "holds"), (("ppo",), 0.05, "does not hold"), ((), 3.0, "undecided at n = 5 seeds")],
)
@pytest.mark.parametrize("environments", [1, 3])
def test_return_claims_are_judged_each_of_three_ways(tmp_path, better, noise, said, environments):
    suite = make_suite(seeds=5, environments=environments)
    make_results(suite, tmp_path, better=better, noise=noise)
    judged = judge(suite, tmp_path, RETURN)
    assert judged.said == said
    assert judged.n.startswith("5 seeds, Hopper-v4") and judged.missing == []


def test_below_five_seeds_nothing_is_said_of_returns(tmp_path):
    for seeds in (2, 3, 4):
        suite = make_suite(seeds=seeds)
        make_results(suite, tmp_path / str(seeds), better=("blpo",), noise=0.01, slower=("ppo",))
        for claim in (RETURN, ABOVE):
            assert judge(suite, tmp_path / str(seeds), claim).said == f"undecided at n = {seeds} seeds"
        assert judge(suite, tmp_path / str(seeds), TIME).said == "holds"


def test_equal_returns_hold_and_a_loss_just_beyond_the_margin_does_not(tmp_path):
    suite = make_suite(seeds=5, environments=1)
    make_results(suite, tmp_path, noise=0.0)
    path = tmp_path / suite.name / "runs.json"
    made = json.loads(path.read_text())
    zero, one = (load_reference()["Hopper-v4"][key] for key in ("random", "reference"))
    for loss, said in ((0.0, "holds"), (0.049, "holds"), (0.051, "does not hold")):
        for run in made["runs"]:
            run["final_return"] = zero + (one - zero) * (1 - loss * (run["method"] == "blpo"))
        path.write_text(json.dumps(made))
        assert judge(suite, tmp_path, RETURN).said == said


def shifted(folder, suite, shifts: dict[str, float], seeds_apart: float = 0.01) -> None:
    """Every run ends at the reference level, plus 0.01 of it a seed; BLPO's by as much as `shifts` says more, by environment."""
    path = folder / suite.name / "runs.json"
    made = json.loads(path.read_text())
    for run in made["runs"]:
        zero, one = (load_reference()[run["environment"]][key] for key in ("random", "reference"))
        shift = shifts.get(run["environment"], 0.0) * (run["method"] == "blpo")
        run["final_return"] = zero + (one - zero) * (1 + shift + seeds_apart * run["seed"])
    path.write_text(json.dumps(made))


@pytest.mark.parametrize(
    "seeds, hopper, cheetah, said, words",
    [
        (5, 0.0, 0.0, "undecided at n = 5 seeds", "for it: none; against it: none"),
        (5, 0.2, 0.2, "holds", "for it: Hopper-v4, HalfCheetah-v4; against it: none"),
        (5, 0.2, 0.0, "holds", "for it: Hopper-v4; against it: none"),
        (5, 0.3, -0.1, "undecided at n = 5 seeds", "for it: Hopper-v4; against it: HalfCheetah-v4"),
        (5, -0.2, 0.0, "does not hold", "for it: none; against it: Hopper-v4"),
        (5, -0.3, 0.1, "undecided at n = 5 seeds", "for it: HalfCheetah-v4; against it: Hopper-v4"),
        (4, 0.2, 0.2, "undecided at n = 4 seeds", "for it: Hopper-v4, HalfCheetah-v4"),
    ],
)
def test_above_needs_an_interval_above_zero_no_task_against_it_and_five_seeds(tmp_path, seeds, hopper, cheetah, said, words):
    suite = make_suite(seeds=seeds)
    make_results(suite, tmp_path)
    shifted(tmp_path, suite, {"Hopper-v4": hopper, "HalfCheetah-v4": cheetah})
    judged = judge(suite, tmp_path, ABOVE)
    assert judged.said == said and words in judged.evidence
    if hopper == cheetah == 0 and seeds == 5:
        assert judge(suite, tmp_path, RETURN).said == "holds"  # at least as good, and yet not above


def test_a_claim_over_training_judges_the_whole_curve(tmp_path):
    suite = make_suite(seeds=5, environments=1)
    make_results(suite, tmp_path, noise=0.0)
    shifted(tmp_path, suite, {"Hopper-v4": 0.2})
    over = dataclasses.replace(ABOVE, over="training")
    assert judge(suite, tmp_path, ABOVE).said == judge(suite, tmp_path, over).said == "holds"
    for path in (tmp_path / suite.name).glob("*__blpo__*.csv"):  # the final returns stay
        lines = path.read_text().splitlines()
        cells = [line.split(",") for line in lines[1:]]
        lines[1:] = [",".join([step, seconds, value and "0", n]) for step, seconds, value, n in cells]
        path.write_text("\n".join(lines) + "\n")
    assert judge(suite, tmp_path, ABOVE).said == "holds" and judge(suite, tmp_path, over).said == "does not hold"


def test_a_claim_in_evaluation_judges_the_last_evaluations(tmp_path):
    """The last tenth of the grid, bins without an evaluation left out; a run that diverged counts with the random policy's."""
    suite = make_suite(seeds=5, environments=1, diagnostics=("charts/eval_return",))
    make_results(suite, tmp_path, noise=0.0, points=30)
    evaluated = dataclasses.replace(ABOVE, over="evaluation")
    for path in (tmp_path / suite.name).glob("*.csv"):
        method, seed = path.stem.split("__")[1:]
        level = 1000.0 * (1 + (method == "ppo")) + int(seed)
        cells = ["charts/eval_return"] + ["7"] * 27 + [f"{level - 1}", "", f"{level + 1}"]
        path.write_text("\n".join(",".join(pair) for pair in zip(path.read_text().splitlines(), cells)) + "\n")
    results = scores.load_results(suite, tmp_path)
    assert scores.evaluation_returns(results, "blpo", "Hopper-v4").tolist() == [1001, 1002, 1003, 1004, 1005]
    assert judge(suite, tmp_path, evaluated).said == "does not hold"  # it would hold the other way round
    assert judge(suite, tmp_path, dataclasses.replace(evaluated, better="ppo", than="blpo")).said == "holds"
    path = tmp_path / suite.name / "runs.json"
    made = json.loads(path.read_text())
    made["runs"][0]["diverged"] = True
    path.write_text(json.dumps(made))
    first = made["runs"][0]["method"], made["runs"][0]["environment"]
    assert scores.evaluation_returns(scores.load_results(suite, tmp_path), *first)[0] == load_reference()[first[1]]["random"]


@pytest.mark.parametrize("slower, said", [(("ppo",), "holds"), (("blpo",), "does not hold")])
def test_time_claims_are_judged_by_pairs(tmp_path, slower, said):
    suite = make_suite(seeds=3)
    make_results(suite, tmp_path, slower=slower, leave_out=("Hopper-v4__ppo__2",))
    judged = judge(suite, tmp_path, TIME)
    assert (judged.said, judged.missing) == (said, ["Hopper-v4__ppo__2"])
    assert judged.n == "2-3 pairs, Hopper-v4, HalfCheetah-v4"


def test_time_is_undecided_when_the_pairs_disagree(tmp_path):
    suite = make_suite(seeds=2, environments=1)
    make_results(suite, tmp_path)
    path = tmp_path / suite.name / "runs.json"
    made = json.loads(path.read_text())
    for run in made["runs"]:
        run["wall_time_s"] = 100.0 if run["method"] == "ppo" else (50.0, 200.0)[run["seed"] - 1]
    path.write_text(json.dumps(made))
    judged = judge(suite, tmp_path, TIME)
    assert (judged.said, judged.evidence) == ("undecided at n = 2 pairs", "ratio = 1.00 [0.50, 2.00]")


def test_an_untimed_method_has_returns_and_no_times(tmp_path):
    suite = make_suite(methods=4, seeds=3, claims=(TIME,))
    busy = dataclasses.replace(suite.methods["blpo"], untimed="the machine was busy")
    suite = dataclasses.replace(suite, methods=suite.methods | {"blpo": busy})
    make_results(suite, tmp_path)
    judged = judge(suite, tmp_path, TIME)
    assert judged.said == "undecided at n = 0 pairs" and judged.missing == []
    report.report([suite], tmp_path, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    times = text.split("### Wall-clock time")[1].split("###")[0]
    assert "Left out: BLPO, the machine was busy." in times and "| BLPO | - | - |" in times
    assert not re.search(r"\| BLPO \| - \| - \|", text.split("### Final return")[1].split("###")[0])
    made = figures.figures(suite, scores.load_results(suite, tmp_path))
    for name, there in (("returns_steps", True), ("aggregate", True), ("returns_minutes", False), ("runtime", False)):
        labels = [each.get_text() for each in made[name].legends[0].get_texts()]
        assert any(each.startswith("BLPO (") for each in labels) == there and len(labels) == 3 + there, name


def test_a_suite_without_times_says_why_and_draws_none(tmp_path):
    suite = make_suite(seeds=2)
    methods = {name: dataclasses.replace(each, untimed="the machine was busy") for name, each in suite.methods.items()}
    suite = dataclasses.replace(suite, methods=methods)
    make_results(suite, tmp_path)
    report.report([suite], tmp_path, tmp_path / "results.md")
    times = (tmp_path / "results.md").read_text().split("### Wall-clock time")[1].split("###")[0]
    assert times.strip() == "Not shown: the machine was busy."
    assert not {"returns_minutes", "runtime"} & figures.figures(suite, scores.load_results(suite, tmp_path)).keys()


def test_one_seed_gives_no_interval_and_no_verdict(tmp_path):
    suite = make_suite(seeds=1, claims=(RETURN, TIME))
    make_results(suite, tmp_path, better=("blpo",), slower=("ppo",))
    for claim in suite.claims:
        judged = judge(suite, tmp_path, claim)
        assert judged.said.startswith("undecided at n = 1") and judged.evidence.endswith("no interval")
    report.report([suite], tmp_path, tmp_path / "results.md")
    assert "undecided at n = 1 seeds" in (tmp_path / "results.md").read_text()


def test_an_environment_without_runs_leaves_the_claim_undecided(tmp_path):
    suite = make_suite(seeds=2)
    gone = tuple(f"HalfCheetah-v4__blpo__{seed}" for seed in (1, 2))
    make_results(suite, tmp_path, better=("blpo",), leave_out=gone)
    judged = judge(suite, tmp_path, RETURN)
    assert (judged.said, judged.missing) == ("undecided at n = 0 seeds", list(gone))


def test_the_page_has_every_table_and_names_what_is_missing(tmp_path):
    suite = make_suite(methods=4, seeds=4, claims=(RETURN, TIME), baselines=("ppo", "nested"))
    make_results(suite, tmp_path / "results", leave_out=("HalfCheetah-v4__blpo__3",))
    (tmp_path / "results" / suite.name / "returns_steps.png").touch()  # the page links the figures that are there
    out = tmp_path / "docs" / "results.md"
    report.report([suite], tmp_path / "results", out)
    text = out.read_text()
    for path in (tmp_path / "results", tmp_path):
        assert str(path) not in text
    for heading in (
        "### Claims\n", "### Claims, each environment alone", "### Final return", "### Difference to PPO",
        "### Difference to nested control", "### All environments together", "### Wall-clock time", "### Beside the paper", "### Figures",
        "### Where it comes from",
    ):  # fmt: skip
        assert text.count(heading) == 1, heading
    assert "Missing runs, with their seeds: HalfCheetah-v4: blpo (3)." in text
    assert "](../results/synthetic/returns_steps.png)" in text and "runtime.png" not in text
    assert "31 runs; seeds 1, 2, 3, 4;" in text
    assert "commits 0123456789;" in text and "a processor" in text and "torch 2.13.0" in text
    returns = scores.final_returns(scores.load_results(suite, tmp_path / "results"), "ppo", "Hopper-v4")
    assert f"| PPO | {returns.mean():.0f} ± {np.std(returns, ddof=1):.0f} (4)<br>[" in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "each state its own start, with refreshed advantages (commit 0123456789, before the exact one)."),
        ({"mixed_term": "timestep", "mixed_discount": None}, "each state its own start, with refreshed advantages (commit 0123456789, before"),
        ({"mixed_term": "trajectory", "mixed_discount": None}, "κ = γλ, with refreshed advantages (commit 0123456789, before the exact one)."),
        ({"mixed_term": "trajectory", "mixed_discount": 0.99}, "κ = 0.99, with refreshed advantages (commit 0123456789, before the"),
        ({"mixed_discount": None}, "κ = γλ, with the advantages of the targets (commit 0123456789)."),
        ({"mixed_discount": 0.0, "mixed_advantages": "refreshed"}, "each state its own start, with refreshed advantages (commit 0123456789)."),
        ({"leader": "released", "mixed_discount": None}, "as in the released code (commit 0123456789)."),
    ],
)
def test_the_page_says_which_mixed_term_the_runs_had(tmp_path, arguments, words):
    suite = make_suite(seeds=1)
    make_results(suite, tmp_path)

    def blpo(made):
        for run in made["runs"]:
            if run["method"] != "ppo":
                run |= {"script": "blpo_continuous.py", "arguments": {"ihvp": "none" if run["method"] == "nested" else "nystrom"} | arguments}

    edit(suite, tmp_path, blpo)
    text = page([suite], tmp_path)
    assert text.count("Mixed term of the hypergradient") == 1 and f"Mixed term of the hypergradient: {words}" in text


def test_several_readings_of_the_mixed_term_name_their_methods(tmp_path):
    suite = dataclasses.replace(make_suite(methods=4, seeds=1), restated=("mixed-discount",))
    make_results(suite, tmp_path)
    readings = {"blpo": {}, "blpo-cg": {"mixed_discount": None}}

    def blpo(made):
        for run in made["runs"]:
            if run["method"] in readings:
                run |= {"script": "blpo_continuous.py", "arguments": {"ihvp": "cg"} | readings[run["method"]]}

    edit(suite, tmp_path, blpo)
    text = page([suite], tmp_path)
    assert "each state its own start, with refreshed advantages (commit 0123456789, before the exact one): BLPO.\n" in text
    assert "κ = γλ, with the advantages of the targets (commit 0123456789): BLPO, conjugate gradient.\n" in text
    assert "by default or under another name of then: `mixed-discount`." in text


def test_runs_that_ended_early_have_no_time(tmp_path):
    """Of a run that diverged: neither in the median nor in a pair."""
    suite = make_suite(seeds=2, environments=1, claims=(TIME,))
    make_results(suite, tmp_path)

    def early(made):
        for run in made["runs"]:
            if run["job"] == "Hopper-v4__ppo__1":
                run |= {"diverged": True, "wall_time_s": None}

    edit(suite, tmp_path, early)
    assert judge(suite, tmp_path, TIME).n == "1 pairs, Hopper-v4"
    assert "### Wall-clock time" in page([suite], tmp_path)


def test_the_committed_page_is_that_of_the_committed_results(tmp_path):
    suites = [load_suite(name, check=False) for name in known_suites()]
    text = page([suite for suite in suites if (RESULTS / suite.name / "runs.json").exists()], RESULTS, tmp_path / "results.md")
    here = os.path.relpath(RESULTS, tmp_path)
    assert text.replace(here, "../benchmark/results") == (ROOT / "docs" / "results.md").read_text()


def test_two_reports_have_the_same_bytes(tmp_path):
    suite = make_suite(claims=(RETURN, TIME))
    make_results(suite, tmp_path)
    report.report([suite], tmp_path, tmp_path / "one.md")
    report.report([suite], tmp_path, tmp_path / "two.md")
    assert (tmp_path / "one.md").read_bytes() == (tmp_path / "two.md").read_bytes()


def test_ratios_of_negative_returns_are_not_shown():
    assert report.ratio(-100.0, -50.0) == report.ratio(100.0, -50.0) == report.ratio(None, 3.0) == "-"
    assert report.ratio(3.0, 2.0) == "1.50"


def test_the_papers_returns_stand_beside_ours_where_the_task_is_the_same(tmp_path):
    """On CartPole, with PPO's own; on Hopper, which the paper has from other physics, only ratios to PPO."""
    for environment, rows in (("CartPole-v1", ["PPO", "nested control", "BLPO"]), ("Hopper-v4", ["nested control", "BLPO"])):
        suite = make_suite(environments=1, seeds=2)
        methods = {name: dataclasses.replace(each, environments=(environment,)) for name, each in suite.methods.items()}
        suite = dataclasses.replace(suite, name=environment, environments=(environment,), methods=methods)
        make_results(suite, tmp_path)
        results = scores.load_results(suite, tmp_path)
        table = [line.split(" | ") for line in report.paper_table(suite, results) if line.startswith(f"| {environment}")]
        assert [cells[1] for cells in table] == rows
        ours = scores.final_returns(results, "blpo", environment).mean()
        assert table[-1][3:5] == (["500", f"{ours:.0f}"] if environment == "CartPole-v1" else ["-", "-"])
        assert table[-1][5] == ("1.18" if environment == "CartPole-v1" else "1.09")


def test_a_suite_without_runs_says_so(tmp_path):
    suite = make_suite(seeds=1, claims=(RETURN,))
    report.report([suite], tmp_path, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "No run of this suite has been collected." in text
    assert "**undecided at n = 0 seeds**" in text and "Missing runs, with their seeds: Hopper-v4: ppo (1" in text


def test_a_run_without_a_final_return_is_named_and_left_out(tmp_path):
    suite = make_suite(environments=1)
    make_results(suite, tmp_path)
    path = tmp_path / suite.name / "runs.json"
    made = json.loads(path.read_text())
    made["runs"][0]["final_return"] = None
    path.write_text(json.dumps(made))
    report.report([suite], tmp_path, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert f"no episode ended in the last 10 % of training: {made['runs'][0]['job']}." in text and "Diverged" not in text
    assert judge(suite, tmp_path, RETURN).n == "2-3 seeds, Hopper-v4"


def test_a_diverged_run_is_named_and_counts(tmp_path):
    suite = make_suite(environments=1)
    make_results(suite, tmp_path)
    path = tmp_path / suite.name / "runs.json"
    made = json.loads(path.read_text())
    made["runs"][0] |= {"final_return": math.nan, "diverged": True}
    path.write_text(json.dumps(made))
    report.report([suite], tmp_path, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert f"Diverged (parameters not finite at the end): {made['runs'][0]['job']}." in text and "no episode ended" not in text
    assert judge(suite, tmp_path, RETURN).n == "3 seeds, Hopper-v4"


def test_runs_of_another_suite_stand_beside_the_suites_own(tmp_path):
    source = make_suite(methods=2, environments=1, name="source")
    make_results(source, tmp_path)
    taken = dataclasses.replace(source.methods["ppo"], name="same", label="PPO again", runs_of=("source", "ppo"))
    suite = make_suite(methods=1, environments=1, baselines=("same",))
    suite = dataclasses.replace(suite, methods=suite.methods | {"same": taken})
    make_results(suite, tmp_path)
    assert all("__same__" not in path.name for path in (tmp_path / suite.name).iterdir())
    results, theirs = scores.load_results(suite, tmp_path), scores.load_results(source, tmp_path)
    assert results.missing == [] and list(scores.final_returns(results, "same", "Hopper-v4")) == list(
        scores.final_returns(theirs, "ppo", "Hopper-v4")
    )
    for seed in (1, 2, 3):
        curve = results.curves[f"Hopper-v4__same__{seed}"]["episodic_return"]
        np.testing.assert_array_equal(curve, theirs.curves[f"Hopper-v4__ppo__{seed}"]["episodic_return"])
    text = page([suite], tmp_path)
    assert "Runs that another suite launched, by equal commands: PPO again, of source." in text
    # what was made by another command is not this method's, and is missing
    edit(source, tmp_path, lambda made: made["runs"][0].update(command=made["runs"][0]["command"] + " --gamma 0.9"))
    assert scores.load_results(suite, tmp_path).missing == ["Hopper-v4__same__1"]
    shutil.rmtree(tmp_path / "source")
    results = scores.load_results(suite, tmp_path)
    assert results.missing == [f"Hopper-v4__same__{seed}" for seed in (1, 2, 3)]
    assert "Runs that another suite launched" not in page([suite], tmp_path)


def test_dead_runs_are_named_and_claims_judged_without_them_as_well(tmp_path):
    suite = make_suite(seeds=6, environments=1, diagnostics=("losses/actor_gradient_norm",))
    suite = dataclasses.replace(suite, claims=(ABOVE,), dead=Dead("losses/actor_gradient_norm", 1e-8, "dead actor"))
    make_results(suite, tmp_path, points=20, noise=0.0)
    shifted(tmp_path, suite, {"Hopper-v4": 0.2})
    edit(suite, tmp_path, lambda made: [run.update(final_return=0.0) for run in made["runs"] if is_blpo_1(run["job"])])
    for path in (tmp_path / suite.name).glob("*.csv"):
        norms = ["losses/actor_gradient_norm", *["0.5"] * 18, *(["0", "1e-9"] if is_blpo_1(path.stem) else ["", "1e-6"])]
        path.write_text("\n".join(",".join(pair) for pair in zip(path.read_text().splitlines(), norms)) + "\n")
    results = scores.load_results(suite, tmp_path)
    assert results.dead == ["Hopper-v4__blpo__1"]
    assert scores.load_results(dataclasses.replace(suite, dead=None), tmp_path).dead == []
    text = page([suite], tmp_path)
    assert "With a dead actor (`losses/actor_gradient_norm` below 1e-08 over the last tenth): Hopper-v4__blpo__1." in text
    (whole,), (living,) = (rows_of(text, heading)[1:] for heading in ("### Claims", "### Claims, without the runs with a dead actor"))
    assert whole[2] == "**undecided at n = 6 seeds**" and whole[4].startswith("6 seeds")
    assert living[1] == "**holds**" and living[3].startswith("5-6 seeds")
    assert results.without(results.dead).dead == [] and len(results.runs["blpo", "Hopper-v4"]) == 6


def test_beyond_its_gates_nothing_is_claimed_of_a_method(tmp_path):
    suite = make_suite(seeds=5, diagnostics=("plain", "correction", "direct"), claims=(ABOVE, RETURN, Claim("nested", "nested", "ppo")))
    suite = dataclasses.replace(suite, gates=(Gate("blpo", "plain", most=0.2), Gate("blpo", "correction", over="direct", least=0.1)))
    assert suite.environments == ("Hopper-v4", "HalfCheetah-v4")

    def judged(name: str, plain: dict[str, float], correction: dict[str, float]):
        make_results(suite, tmp_path / name, better=("blpo",), noise=0.01)
        for path in (tmp_path / name / suite.name).glob("*.csv"):
            head, first, *rows = path.read_text().splitlines()
            task = path.stem.split("__")[0]
            values = f"{plain.get(task, 0.0)},{correction.get(task, 1.0)},2.0"
            path.write_text("\n".join([f"{head},plain,correction,direct", f"{first},,,", *(f"{row},{values}" for row in rows)]) + "\n")
        return [judge(suite, tmp_path / name, claim) for claim in suite.claims]

    for each in judged("open", {}, {}):
        assert each.said == "holds" and "without" not in each.evidence and each.n.endswith("Hopper-v4, HalfCheetah-v4")
    above, least, other = judged("plain", {"Hopper-v4": 0.21}, {"Hopper-v4": 0.19})
    assert above.said == least.said == "holds" and above.n == least.n == "5 seeds, HalfCheetah-v4"
    assert "; without Hopper-v4 (`plain` of BLPO 0.21, more than 0.2; `correction` / `direct` of BLPO 0.09" in above.evidence
    assert other.n.endswith("Hopper-v4, HalfCheetah-v4") and "without" not in other.evidence
    above, least, other = judged("closed", {"Hopper-v4": 0.21, "HalfCheetah-v4": 1.0}, {})
    assert above.said == least.said == "nothing is claimed" and other.said == "holds"
    assert "**nothing is claimed**" in page([suite], tmp_path / "closed")
    assert {each.said for each in judged("at the bound", {"Hopper-v4": 0.2}, {"Hopper-v4": 0.2})} == {"holds"}


def is_blpo_1(job: str) -> bool:
    return job == "Hopper-v4__blpo__1"


def test_paper_and_reference_files_are_complete():
    levels, paper = load_reference(), json.loads(report.PAPER.read_text())
    for environment in (*ENVIRONMENTS, "InvertedPendulum-v4", "CartPole-v1", "Acrobot-v1"):
        entry = levels[environment]
        assert entry["random"] < entry["reference"] and entry["random_source"] and entry["reference_source"]
        assert paper["final_return"][environment]
    with pytest.raises(ValueError, match="no levels of Nowhere-v0"):
        normalise("Nowhere-v0", np.zeros(1), levels)


@pytest.mark.parametrize("value, text", [(2383.4, "2383"), (41.54, "41.5"), (-0.123, "-0.12"), (-0.001, "0.00")])
def test_numbers_have_as_many_digits_as_say_something(value, text):
    assert markdown.number(value) == text


# ---- What the page says besides ---------------------------------------------------------------------------------
def test_a_claim_with_failed_runs_is_undecided_and_names_them(tmp_path):
    suite = make_suite(seeds=6, claims=(RETURN, TIME))
    gone = ("Hopper-v4__blpo__2", "HalfCheetah-v4__ppo__3")
    make_results(suite, tmp_path, better=("blpo",), slower=("ppo",), leave_out=gone, noise=0.05)
    assert judge(suite, tmp_path, RETURN).said == judge(suite, tmp_path, TIME).said == "holds"
    edit(suite, tmp_path, lambda made: made.update(failed=[gone[0]]))
    for claim in suite.claims:
        judged = judge(suite, tmp_path, claim)
        assert (judged.said, judged.failed) == ("undecided: 1 of its runs failed", [gone[0]]) and set(judged.missing) == set(gone)
    text = page([suite], tmp_path)
    assert "| HalfCheetah-v4: ppo (3); failed: Hopper-v4: blpo (2) |" in text
    assert "Of these have failed: Hopper-v4: blpo (2)." in text and "**holds**" not in text.replace("The claim **holds**", "")


def test_runs_collected_together_though_mixed_are_disclosed_with_the_commit_of_each_method(tmp_path):
    suite = make_suite()
    make_results(suite, tmp_path)
    plain = page([suite], tmp_path)
    assert "Mixed" not in plain and "Commit " not in plain and "attempt" not in plain and "load average" not in plain

    def change(made):
        made["mixed"] = ["the commits 0123456789, fedcba9876"]
        for run in made["runs"]:
            if run["method"] == "blpo":
                run |= {"commit": "fedcba9876543210", "commits": ["fedcba9876543210"], "dirty": True, "load": 1 + run["seed"] / 10}
        made["runs"][0] |= {"attempts": 3}

    edit(suite, tmp_path, change)
    text = page([suite], tmp_path)
    assert "commits 0123456789, fedcba9876+ (+: with uncommitted changes);" in text
    assert "Commit 0123456789: PPO; nested control.\n" in text and "Commit fedcba9876+: BLPO.\n" in text
    assert "**Mixed** (`--allow-mixed`): the commits 0123456789, fedcba9876.\n" in text
    assert "load average at their starts and ends at most 1.3;" in text
    assert "In more than one attempt: 1 of the runs." in text and ": Hopper-v4: ppo (1).\n" in text


def test_runs_made_without_git_are_reported(tmp_path):
    suite = make_suite()
    make_results(suite, tmp_path)
    edit(suite, tmp_path, lambda made: [run.update(commit=None, commits=[None], dirty=None) for run in made["runs"]])
    assert "commits unknown (no git); machines" in page([suite], tmp_path)


def test_the_page_begins_with_the_verdicts_of_all_suites_the_headline_first(tmp_path):
    suites = [make_suite(name=name, claims=(RETURN, TIME)) for name in ("first", "headline")] + [make_suite(name="plain")]
    suites[1] = dataclasses.replace(suites[1], headline=True)
    for suite in suites:
        make_results(suite, tmp_path)
    text = page(suites, tmp_path)
    assert re.findall("^## (.*)", text, re.M) == [
        "Verdicts", "The rule", "The tables beside the paper", "headline", "first", "plain",
    ]  # fmt: skip
    rows = rows_of(text, "## Verdicts")
    assert [row[0] for row in rows[1:]] == ["[headline](#headline)"] * 2 + ["[first](#first)"] * 2
    judged = judge(suites[0], tmp_path, TIME)
    assert rows[4][1:] == [TIME.text, f"**{judged.said}**", judged.evidence, judged.n]
    assert "Suites without a claim: [plain](#plain)." in text
    for once in ("The paper's returns stand beside ours", "arXiv:2505.11714", "it is no certainty"):
        assert text.count(once) == 1, once


def test_each_environment_of_a_claim_is_shown_alone_and_once(tmp_path):
    suite = make_suite(seeds=3, claims=(RETURN, ABOVE, TIME))
    make_results(suite, tmp_path)
    rows = rows_of(page([suite], tmp_path), "### Claims, each environment alone")[1:]
    assert [row[:2] for row in rows] == [
        [f"BLPO / PPO, {measure}", each] for measure in ("return", "time") for each in ("Hopper-v4", "HalfCheetah-v4")
    ]
    methods = {name: dataclasses.replace(each, environments=("HalfCheetah-v4",)) for name, each in suite.methods.items()}
    alone = dataclasses.replace(suite, environments=("HalfCheetah-v4",), methods=methods)
    for row, claim in ((rows[1], RETURN), (rows[3], TIME)):
        assert row[2] == judge(alone, tmp_path, claim).evidence and row[3] == ("3 pairs" if claim is TIME else "3 seeds")
    assert "each environment alone" not in page([alone], tmp_path)


def test_pooled_differences_are_those_of_the_claims(tmp_path):
    suite = make_suite(methods=4, seeds=3, claims=(RETURN,), baselines=("ppo", "blpo"))
    make_results(suite, tmp_path)
    rows = rows_of(page([suite], tmp_path), "### All environments together")
    second = next(index for index, row in enumerate(rows) if row == ["method", "minus PPO", "minus BLPO"])
    table = {row[0]: row[1:] for row in rows[second + 1 :]}
    assert set(table) == {"PPO", "nested control", "BLPO", "BLPO, conjugate gradient"}
    assert f"d = {table['BLPO'][0]}" == judge(suite, tmp_path, RETURN).evidence and table["PPO"][0] == table["BLPO"][1] == "-"
    assert table["PPO"][1].split()[0] == table["BLPO"][0].split()[0].translate(str.maketrans("+-", "-+"))


def test_the_mean_of_three_runs_has_an_interval(tmp_path):
    returns = np.array([1000.0, 1400.0, 1500.0, 1900.0])
    interval = statistics.stratified_bootstrap(statistics.mean, [returns[:3]])
    assert report.summary(returns[:2]) == "1200 ± 283 (2)"
    assert report.summary(returns[:3]) == f"1300 ± 265 (3)<br>[{interval.low:.0f}, {interval.high:.0f}]"
    assert report.summary(returns).startswith("1450 ± 370 (4)<br>[") and report.summary(returns).endswith("], IQM 1450")


def test_diagnostics_are_means_over_runs_of_means_over_rows(tmp_path):
    suite = make_suite(seeds=2, environments=1, diagnostics=("bilevel/cosine", "time/env", "never/there"))
    untimed = dataclasses.replace(suite.methods["blpo"], untimed="the machine was busy")
    suite = dataclasses.replace(suite, methods=suite.methods | {"blpo": untimed})
    make_results(suite, tmp_path, points=3)
    for path in (tmp_path / suite.name).glob("*.csv"):
        method, seed = path.stem.split("__")[1:]
        cells = {"ppo": ["", "", ""], "nested": ["0.5", "", "0.7"], "blpo": ["0.2", "0.3", "nan"]}[method]
        if method != "ppo":
            cells = ["bilevel/cosine,time/env"] + [f"{cell and float(cell) * int(seed)},2" for cell in cells]
            path.write_text("\n".join(",".join(pair) for pair in zip(path.read_text().splitlines(), cells)) + "\n")
    rows = rows_of(page([suite], tmp_path), "### Diagnostics")
    assert rows == [
        ["environment", "method", "`bilevel/cosine`", "`time/env`"],
        ["Hopper-v4", "nested control", "0.9", "2"],
        ["Hopper-v4", "BLPO", "0.375", "-"],
    ]
    assert "### Diagnostics" not in page([dataclasses.replace(suite, diagnostics=())], tmp_path)
