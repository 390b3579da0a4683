"""Scores, verdicts and page on made-up results, and the committed page against the committed results."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from synthetic_suite import TASKS, edit, make_results, make_suite

from benchmark import claims, figures, markdown, report, scores, statistics
from benchmark.data import load_results
from benchmark.reference import load_reference
from benchmark.statistics import Comparison
from benchmark.suites import RESULTS, ROOT, BadSuite, Claim, known_suites, load_suite

ABOVE = Claim(text="above", better="blpo", than="nested", measure="above")
TURNED = Claim(text="turned", better="nested", than="blpo")
TIME = Claim(text="faster", better="blpo", than="nested", measure="time")


@pytest.fixture(autouse=True)
def few_resamples(request, monkeypatch):
    if "committed" not in request.node.name:
        monkeypatch.setattr(statistics, "RESAMPLES", 2000)


def page(suites, folder: Path, out: Path | None = None) -> str:
    out = out or folder / "results.md"
    report.report(suites, folder, out)
    return out.read_text()


def verdict(suite, folder: Path, claim: Claim) -> str:
    return report.judged(scores.Comparisons(suite, load_results(suite, folder)), claim)[0]


def of_blpo(level: float):
    """BLPO's runs end at this score, others at 0.8."""
    return lambda method, _: level if method == "blpo" else 0.8


# ---- Verdicts ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "level, noise, said",
    [(1.2, 0.1, "better"), (0.3, 0.1, "worse"), (0.8, 0.01, "equivalent"), (0.9, 0.4, "inconclusive")],
)
def test_the_four_verdicts_and_the_same_of_the_other_direction(tmp_path, level, noise, said):
    suite = make_suite(claims=(ABOVE,))
    make_results(suite, tmp_path, of_blpo(level), noise)
    other = {"better": "worse", "worse": "better"}.get(said, said)
    assert (
        verdict(suite, tmp_path, ABOVE) == f"**{said}**"
        and verdict(suite, tmp_path, TURNED) == f"**{other}**"
    )


def test_below_five_seeds_nothing_is_decided_and_times_need_three_pairs(tmp_path):
    for seeds, returns, time in ((4, "n = 4", "better"), (2, "n = 2", "n = 2")):
        suite = make_suite(seeds=seeds, name=f"suite-{seeds}")
        make_results(suite, tmp_path, of_blpo(2.0), slower=("nested",))
        assert verdict(suite, tmp_path, ABOVE) == f"**inconclusive** ({returns})"
        assert time in verdict(suite, tmp_path, TIME)


COMPARISON = {"estimate": 0.1, "runs": (5, 5), "low": 0.05, "high": 0.2, "p": 0.01, "outside": 0.5}
COMPARISON |= {"narrow": (0.06, 0.19), "wide": (0.04, 0.21)}
ACROSS = {"low": -0.01, "narrow": (-0.005, 0.19), "wide": (-0.02, 0.21)}
SMALL = {"low": -0.05, "high": 0.05, "narrow": (-0.04, 0.04), "wide": (-0.06, 0.06), "p": 0.9}
NEAR = "**inconclusive** (within Monte Carlo error of a threshold, here better)"


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, "**better**"),
        ({"p": 0.06}, "**inconclusive** (interval and p disagree)"),
        (ACROSS, "**inconclusive** (interval and p disagree)"),
        ({"wide": (-0.001, 0.21)}, NEAR),
        ({"p": 0.0495, "counted": False}, NEAR),
        ({"p": 0.0495}, "**better**"),
        (SMALL | {"outside": 0.01}, "**equivalent**"),
        (SMALL | {"outside": 0.03}, "**inconclusive**"),
        ({"low": math.nan, "high": math.nan, "runs": (1, 5)}, "**inconclusive** (n = 1)"),
    ],
)
def test_a_verdict_needs_interval_and_p_and_no_luck_of_the_draw(change, said):
    assert claims.verdict(Comparison(**(COMPARISON | change))) == said


def test_a_comparison_with_failed_runs_or_none_is_inconclusive(tmp_path):
    suite = make_suite()
    assert verdict(suite, tmp_path, ABOVE) == "**inconclusive** (no runs)"
    make_results(suite, tmp_path, of_blpo(2.0))

    def fail(content, _):
        content.failed = content.missing = [content.runs.pop(2).job]

    edit(suite, tmp_path, fail)
    assert load_results(suite, tmp_path).failed == ["Hopper-v4__blpo__0"]
    assert verdict(suite, tmp_path, ABOVE) == "**inconclusive** (1 of its runs failed)"


def test_a_suite_may_grow_task_by_task(tmp_path):
    """A comparison is over the tasks of which both methods have runs, whatever the other methods lack."""
    suite = make_suite()
    make_results(suite, tmp_path, of_blpo(2.0))
    alone = verdict(suite.only((), suite.environments[:1], ()), tmp_path, ABOVE)

    def lose(content, _):
        content.runs = [run for run in content.runs if (run.environment, run.method) != (suite.environments[1], "blpo")]

    edit(suite, tmp_path, lose)
    compared = scores.Comparisons(suite, load_results(suite, tmp_path))
    assert compared.environments(ABOVE) == [suite.environments[0]] and alone == verdict(suite, tmp_path, ABOVE) == "**better**"
    assert compared.of(ABOVE) == compared.of(ABOVE, suite.environments[0])
    other = ABOVE.model_copy(update={"better": "nested"})
    assert compared.environments(other) == list(suite.environments)


def test_the_words_say_what_the_interval_excludes(tmp_path):
    suite = make_suite(environments=3)
    make_results(
        suite, tmp_path, lambda method, task: 1.5 if method == "blpo" and task == "Hopper-v4" else 0.8
    )
    compared = scores.Comparisons(suite, load_results(suite, tmp_path))
    evidence, found = report.judged(compared, ABOVE)[1], compared.of(ABOVE)
    assert f"excludes gains above {found.high:.2f}" in evidence and re.search(
        r"Hopper \+0\.\d+\\\*, HalfCheetah [+-]0\.\d+,", evidence
    )
    assert report.in_words(Comparison(-0.5, (5, 5), -0.7, -0.3, 0.001)).endswith("excludes any gain")
    assert report.in_words(-found).startswith(f"-{found.estimate:.2f} [-{found.high:.2f}, ")


def test_each_pair_is_computed_once(tmp_path, monkeypatch):
    suite, made = make_suite(), []
    make_results(suite, tmp_path)
    compared = scores.Comparisons(suite, load_results(suite, tmp_path))
    monkeypatch.setattr(scores, "compare", lambda tasks: made.append(tasks) or statistics.compare(tasks))
    assert compared.of(ABOVE) == -compared.of(TURNED) and len(made) == 1


def test_a_suite_without_claims_compares_with_its_baselines():
    suite = make_suite(baselines=("ppo", "nested"))
    pairs = [(claim.better, claim.than) for claim in claims.claims(suite)]
    assert pairs == [("nested", "ppo"), ("blpo", "ppo"), ("blpo", "nested")]
    twice = make_suite(claims=(ABOVE, ABOVE.model_copy(update={"measure": "return"}), TIME))
    assert claims.claims(twice) == [ABOVE, TIME]


# ---- Scores ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "script, level", [("ppo_continuous.py", 1443), ("stddpg.py", 10374), ("stsac.py", 9635)]
)
def test_off_policy_suites_have_off_policy_references(tmp_path, script, level):
    suite = make_suite(methods=1, tasks=("HalfCheetah-v4",), script=script)
    make_results(suite, tmp_path)
    random = load_reference()["HalfCheetah-v4"]["random"]
    returns = scores.returns(load_results(suite, tmp_path), "ppo", "HalfCheetah-v4")
    mine = scores.scores(suite, load_results(suite, tmp_path), "ppo", "HalfCheetah-v4")
    np.testing.assert_allclose(mine, (returns - random) / (level - random))


def test_scores_end_at_the_random_level(tmp_path):
    suite = make_suite(methods=1, environments=1)
    make_results(suite, tmp_path, lambda *_: -0.5)
    assert scores.scores(suite, load_results(suite, tmp_path), "ppo", "Hopper-v4").tolist() == [0.0] * 5


def test_returns_of_the_end_of_training_and_in_evaluation(tmp_path):
    suite = make_suite(methods=1, environments=1, seeds=1)
    make_results(suite, tmp_path)

    def change(content, curves):
        content.runs[0].final_return = 7.0
        curves["episodic_return"] = ["", "1.0", "", "4.0", *["4.0"] * 8]
        curves["charts/eval_return"] = [*["0.0"] * 11, "9.0"]

    edit(suite, tmp_path, change)
    results = load_results(suite, tmp_path)
    values = [
        scores.returns(results, "ppo", "Hopper-v4", over).tolist()
        for over in ("end", "training", "evaluation")
    ]
    assert values == [[7.0], [(1 + 1 + 4 * 9) / 11], [9.0]]


def test_runs_that_end_below_a_tenth_of_their_peak_have_collapsed(tmp_path):
    suite = make_suite(methods=1, environments=1)
    make_results(suite, tmp_path, noise=0.0)
    zero, one = (load_reference()["Hopper-v4"][end] for end in ("random", "reference"))

    def fall(content, curves):
        content.runs[0].final_return = zero + 0.079 * (one - zero)  # of a peak of almost 0.8
        content.runs[1].final_return = zero + 0.081 * (one - zero)
        curves.loc[curves["seed"] == 2, "episodic_return"] = str(zero)  # never got anywhere
        content.runs[2].final_return = zero

    edit(suite, tmp_path, fall)
    results = load_results(suite, tmp_path)
    assert scores.collapses(suite, results, "ppo", "Hopper-v4") == (1, 4)
    assert "; 1/4 collapsed" in page([suite], tmp_path)


def test_times_are_compared_by_pairs_of_equal_seeds(tmp_path):
    suite = make_suite(environments=1)
    make_results(suite, tmp_path)
    for_seed = {}

    def change(content, _):
        for run in content.runs:
            run.wall_time_s = (2.0 if run.method == "blpo" else 1.0) * 10**run.seed
            for_seed[run.method, run.seed] = run.wall_time_s
        content.runs = [run for run in content.runs if (run.method, run.seed) != ("nested", 0)]

    edit(suite, tmp_path, change)
    np.testing.assert_allclose(
        np.exp(scores.log_times(load_results(suite, tmp_path), "blpo", "nested", "Hopper-v4")), [2.0] * 4
    )
    assert (
        verdict(suite, tmp_path, TIME) == "**inconclusive** (interval and p disagree)"
    )  # 4 pairs: p is 2 / 16


# ---- The page ----------------------------------------------------------------------------------------------
def test_the_committed_page_is_that_of_the_committed_results(tmp_path):
    suites = [load_suite(name, check=False) for name in known_suites()]
    text = page(suites, RESULTS, tmp_path / "results.md")
    for folder, there in (
        (RESULTS, "../benchmark/results/"),
        (RESULTS.parent / "suites", "../benchmark/suites/"),
        (ROOT / "docs", ""),
    ):
        text = text.replace(os.path.relpath(folder, tmp_path) + "/", there)
    assert text == (ROOT / "docs" / "results.md").read_text()
    assert len(text.splitlines()) <= 400 and all(
        f"[{suite.name}](" in text or suite.name in text
        for suite in suites
        if (RESULTS / suite.name).exists()
    )
    ten = [line for line in text.split("## The rule")[0].splitlines() if line.startswith("| ")][1:]
    assert len(ten) == 10


def test_the_exact_results_have_their_place(tmp_path):
    exact = report.exact_results(RESULTS)
    medians = exact["sobirl_tabular"].groupby(level=0).median().round(2)
    assert medians.loc["reward-shaping", ["sobirl", "x-only"]].tolist() == [-1.35, -0.6]
    assert medians.loc["contract-design", ["sobirl", "x-only"]].tolist() == [-8.67, -7.68]
    assert "| discriminating | 0.031 | 0.031 | 0.031 | 0.677 | p = 0.002 |" in "\n".join(
        report.exact_lines(exact)
    )
    assert report.exact_lines(report.exact_results(tmp_path)) == []


def test_a_section_has_one_table_and_one_figure_and_says_where_the_runs_come_from(tmp_path):
    suite = make_suite(claims=(ABOVE,), untimed="the machine was busy")
    make_results(suite, tmp_path)
    (tmp_path / suite.name / "results.png").touch()
    (tmp_path / "docs").mkdir()
    text = page([suite], tmp_path, tmp_path / "docs" / "page.md").split("## synthetic")[1]
    assert text.count("|---|") and text.count("![") == 1 and "![synthetic](../synthetic/results.png)" in text
    assert "Made up. [Rule and settings](" in text and "With a rule" not in text
    assert "| final return | n | Hopper | HalfCheetah | score | comparisons |" in text
    assert "*30 runs; seeds 0 1 2 3 4; 12000 steps; commits 0123456789; a processor" in text
    assert text.count("against nested control: ") == 1


def test_what_is_out_of_the_ordinary_is_said(tmp_path):
    suite = make_suite(
        environments=1, dead={"column": "losses/actor_gradient_norm", "below": 1e-8, "words": "dead actor"}
    )
    make_results(suite, tmp_path)

    def change(content, curves):
        content.runs[0].diverged, content.runs[0].final_return = True, None
        content.runs[1].final_return = None
        content.runs[3].attempts, content.runs[3].dirty = 2, True
        content.mixed = ["the commits 1, 2"]
        content.missing = [content.runs.pop(-1).job]
        curves.loc[(curves["method"] == "blpo") & (curves["seed"] == 1), "losses/actor_gradient_norm"] = "0.0"

    edit(suite, tmp_path, change)
    text = page([suite], tmp_path)
    assert "1 diverged: Hopper-v4__ppo__0" in text and "1 in more than one attempt: Hopper-v4__ppo__1" in text
    assert (
        "1 without the end of an episode in the last tenth: Hopper-v4__nested__0" in text
        and "0123456789+" in text
    )
    assert "1 missing: Hopper-v4__blpo__4" in text and "**mixed**: the commits 1, 2" in text
    assert "1 stopped learning: Hopper-v4__blpo__1" in text
    assert re.search(
        r"Without the runs with a dead actor: BLPO against PPO: \*\*inconclusive\*\* \(n = 3\), [+-]0", text
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"ihvp": "nystrom"}, "mixed term: the former one"),
        (
            {"ihvp": "nystrom", "mixed_term": "trajectory", "mixed_discount": 0.99},
            "mixed term: along the trajectory",
        ),
        ({"ihvp": "exact", "mixed_discount": None}, "mixed term: exact"),
        ({"ihvp": "exact", "mixed_discount": 0.99}, "mixed term: κ = 0.99"),
        ({"ihvp": "exact", "leader": "released"}, "mixed term: as released"),
        ({"ihvp": "none"}, None),
    ],
)
def test_the_page_says_which_mixed_term_the_runs_had(tmp_path, arguments, words):
    suite = make_suite(environments=1, script="blpo_continuous.py")
    make_results(suite, tmp_path)
    edit(suite, tmp_path, lambda content, _: [setattr(run, "arguments", arguments) for run in content.runs])
    text = page([suite], tmp_path)
    assert f"{words};" in text or f"{words}." in text if words else "mixed term" not in text


def test_suites_that_compare_nothing_or_are_told_elsewhere_have_a_line_and_scratch_suites_none(tmp_path):
    two, alone = make_suite(seeds=2, name="two"), make_suite(1, seeds=2, name="alone", baselines=())
    scratch, past = make_suite(name="smoke", scratch=True), make_suite(name="past", told="docs/blpo_history.md#x")
    for suite in (two, alone, scratch, past):
        make_results(suite, tmp_path)
    text = page([two, alone, scratch, past], tmp_path)
    assert "## alone" in text and "smoke" not in text and "## past" not in text
    assert '- <a id="two"></a>**two**, 12 runs: Made up. ' in text
    line = re.search(r'- <a id="past"></a>\*\*past\*\*, 30 runs: Made up. .*', text)[0]
    assert line.endswith(f"[What came out]({os.path.relpath(ROOT, tmp_path)}/docs/blpo_history.md#x).")


def test_a_suite_that_does_not_aggregate_is_judged_task_by_task(tmp_path):
    """One method is better on one task and worse on the other: pooled that would be nothing."""
    gap = {("blpo", task): 0.4 if index else -0.4 for index, task in enumerate(TASKS[:2])}
    suite = make_suite(name="each", aggregate=False, seeds=10)
    make_results(suite, tmp_path, level=lambda method, task: 0.8 + gap.get((method, task), 0.0))
    row = next(line for line in page([suite], tmp_path).splitlines() if line.startswith("| BLPO |"))
    first, second = (task.removesuffix("-v4") for task in TASKS[:2])
    assert re.search(rf"\*\*worse\*\*, against PPO on {first}: -0\.\d+ \[", row)
    assert re.search(rf"\*\*better\*\*, against PPO on {second}: \+0\.\d+ \[", row)
    blocks = figures.blocks_of_returns(suite, scores.Comparisons(suite, load_results(suite, tmp_path)))
    assert [[label for label, _ in rows] for _, _, rows, _ in blocks] == [[first, second]] * 2


def test_the_headline_suite_comes_first(tmp_path):
    suites = [make_suite(name="first"), make_suite(name="second", headline=True)]
    for suite in suites:
        make_results(suite, tmp_path)
    text = page(suites, tmp_path)
    assert text.index("## second") < text.index("## first") and text == page(suites, tmp_path)


def test_every_top_claim_is_about_something_that_is_there():
    import json

    for entry in json.loads(report.TOP.read_text()):
        if "row" not in entry:
            suite = load_suite(entry["suite"], check=False)
            pairs = [{claim.better, claim.than} for claim in suite.claims]
            assert {entry["better"], entry["than"]} in pairs, entry


# ---- Bad input ---------------------------------------------------------------------------------------------
def test_a_page_is_only_written_where_it_can_be_and_of_results_that_are_there(tmp_path):
    suite = make_suite()
    for out, words in (
        (tmp_path / "no" / "page.md", "there is no folder"),
        (tmp_path, "that is a folder, not a file"),
    ):
        with pytest.raises(BadSuite, match=words):
            report.report([suite], tmp_path, out)
    out = tmp_path / "page.md"
    out.write_text("what was there")
    with pytest.raises(BadSuite, match=f"--results is {tmp_path}, which has no results of any suite"):
        report.report([suite], tmp_path, out)
    make_results(suite, tmp_path)
    (tmp_path / "blpo_tabular").mkdir()
    (tmp_path / "blpo_tabular" / "table.csv").write_text("figure,panel\ncritics,garnet\n")
    with pytest.raises(BadSuite, match="table.csv cannot be read: .*; run blpo_tabular.py again"):
        report.report([suite], tmp_path, out)
    assert out.read_text() == "what was there"


# ---- Words and files ---------------------------------------------------------------------------------------
NUMBERS = {2383.4: "2383", 41.55: "41.5", -0.123: "-0.12", 0.0123: "0.012", -0.0001: "0.000", -math.inf: "-∞"}


@pytest.mark.parametrize("value, text", NUMBERS.items())
def test_numbers_have_as_many_digits_as_say_something(value, text):
    assert markdown.number(value) == text


def test_numbers_with_a_sign_and_probabilities():
    assert [markdown.number(value, sign=True) for value in (0.5, -0.5, 0.0)] == ["+0.50", "-0.50", "0.000"]
    assert [markdown.probability(p) for p in (0.0004, 0.0123, 0.456)] == [
        "p < 0.001",
        "p = 0.012",
        "p = 0.46",
    ]
    assert (
        markdown.spread([5, 3]) == "3-5"
        and markdown.spread([4]) == "4"
        and markdown.short("Hopper-v4") == "Hopper"
        and markdown.short("my.tasks:Walk-v0") == "Walk"
    )
    assert markdown.table(["a|b"], [["c"]]) == ["| a\\|b |", "|---|", "| c |", ""]


def test_every_level_has_a_source_and_ends_above_the_random_one():
    for environment, entry in load_reference().items():
        for each in (entry, *entry.get("by_script", {}).values()):
            assert (
                each["reference"] > entry["random"] and each["reference_source"] and entry["random_source"]
            ), environment
