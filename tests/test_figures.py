"""benchmark/figures.py on made-up results: what a figure shows, that nothing is cut off, and bitwise the
same files."""

import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from synthetic_suite import edit, make_results, make_suite

from benchmark import figures, statistics
from benchmark.data import load_results
from benchmark.suites import BadSuite, load_suite


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)


def drawn(suite, folder, **results):
    """The figure of made-up results, laid out."""
    make_results(suite, folder, **results)
    figure = figures.results_figure(suite, load_results(suite, folder))
    FigureCanvasAgg(figure).draw()
    return figure


def axes_of(figure) -> list:
    """All axes, in the order of drawing."""
    return [axes for part in figure.subfigs for inner in (part.subfigs or [part]) for axes in inner.axes]


def legends(figure) -> list[list[str]]:
    """The entries of each legend."""
    parts = [inner for part in figure.subfigs for inner in (part.subfigs or [part])]
    return [[text.get_text() for text in legend.get_texts()] for part in parts for legend in part.legends]


def test_plot_writes_bitwise_the_same_file_and_leaves_other_files_alone(tmp_path):
    suite = make_suite()
    make_results(suite, tmp_path)
    other = tmp_path / suite.name / "mine.png"
    other.write_text("not ours")
    (path,) = figures.plot(suite, tmp_path)
    first = path.read_bytes()
    assert path == tmp_path / suite.name / "results.png" and first[:4] == b"\x89PNG"
    assert figures.plot(suite, tmp_path) == [path] and path.read_bytes() == first
    assert other.read_text() == "not ours" and not list(path.parent.glob("*.new"))


def test_a_panel_is_named_without_the_module_of_its_task(tmp_path):
    figure = drawn(make_suite(tasks=("Hopper-v4", "benchmark.tasks:SignedCartPole-v1")), tmp_path)
    assert [axes.get_title() for axes in axes_of(figure)[:2]] == ["Hopper-v4", "SignedCartPole-v1"]


def test_the_legend_says_how_many_runs_each_method_has(tmp_path):
    suite = make_suite(seeds=4)
    make_results(suite, tmp_path)
    edit(suite, tmp_path, lambda content, _: content.runs.pop(0))
    figure = figures.results_figure(suite, load_results(suite, tmp_path))
    assert legends(figure)[0][:3] == ["PPO (n=3-4)", "nested control (n=4)", "BLPO (n=4)"]
    gone = suite.environments[0]  # a task that has no runs has no panel, and is not counted

    def leave_out(content, _):
        content.runs = [run for run in content.runs if run.environment != gone]

    make_results(suite, tmp_path)
    edit(suite, tmp_path, leave_out)
    figure = figures.results_figure(suite, load_results(suite, tmp_path))
    assert legends(figure)[0][:3] == ["PPO (n=4)", "nested control (n=4)", "BLPO (n=4)"]


def test_comparisons_have_a_line_for_all_tasks_and_one_for_each(tmp_path):
    figure = drawn(make_suite(), tmp_path)
    panel = axes_of(figure)[2]
    assert panel.texts[0].get_text() == "nested control − PPO (n=5)"
    assert [label.get_text() for label in panel.get_yticklabels()] == ["all", "Hopper", "HalfCheetah"]


def test_times_are_ratios_with_the_papers_beside_them(tmp_path):
    figure = drawn(make_suite(environments=3), tmp_path, slower=("blpo",))
    panels = [axes for axes in axes_of(figure) if axes.get_xlabel().startswith("time / PPO")]
    assert len(panels) == 2 and panels[1].texts[0].get_text() == "BLPO (n=5)"
    dots = {
        line.get_marker(): float(line.get_xdata()[0]) for line in panels[1].lines if line.get_marker() in "oD"
    }
    paper = np.exp(np.mean(np.log([422 / 306, 1240 / 1137, 457 / 349])))  # paper.json
    assert dots["o"] == pytest.approx(1.5, abs=0.1) and dots["D"] == pytest.approx(paper)


def test_untimed_methods_have_no_times(tmp_path):
    suite = make_suite()
    methods = {name: each.model_copy(update={"untimed": "busy"}) for name, each in suite.methods.items()}
    figure = drawn(suite.model_copy(update={"methods": methods}), tmp_path)
    assert not [axes for axes in axes_of(figure) if axes.get_xlabel().startswith("time")]


@pytest.mark.parametrize("methods, grouped", [(7, 1), (10, 3)])
def test_many_methods_are_drawn_in_groups(tmp_path, methods, grouped):
    figure = drawn(make_suite(methods=methods, environments=1), tmp_path)
    entries = legends(figure)
    assert len(entries) == grouped
    assert sum(len([word for word in each if "n=" in word]) for each in entries) == methods


def test_groups_are_by_the_first_word_and_lone_methods_together():
    names = ["ppo", "l0", "l0-nested", "l05", "l05-nested", "l1", "l1-nested", "authors"]
    assert figures.groups(names) == [
        ["ppo", "authors"],
        ["l0", "l0-nested"],
        ["l05", "l05-nested"],
        ["l1", "l1-nested"],
    ]
    assert figures.groups(names[:7]) == [names[:7]]


def test_bands_begin_at_five_runs_and_a_single_run_has_no_mean(tmp_path):
    for runs, bands, lines in ((1, 0, 1), (4, 0, 5), (5, 1, 6)):
        figure = drawn(make_suite(methods=1, environments=1, seeds=runs, baselines=()), tmp_path / str(runs))
        (axes,) = axes_of(figure)
        curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
        assert len(axes.collections) == bands and len(curves) == lines


def swept(folder, widths=(1, 64, 1, 64), sweep="critic-width"):
    """The figure of a suite of two scripts' methods, each at two critic widths."""
    suite = make_suite(methods=4, environments=1, sweep=sweep)
    labels = ["PPO, width 1", "PPO, width 64", "BLPO, width 1", "BLPO, width 64"]
    methods = {
        name: each.model_copy(update={"label": label})
        for (name, each), label in zip(suite.methods.items(), labels)
    }
    suite = suite.model_copy(update={"methods": methods})
    make_results(suite, folder, level=lambda method, _: 0.2 + 0.2 * [*methods].index(method))

    def arguments(content, _):
        for run in content.runs:
            place = [*methods].index(run.method)
            run.arguments = {"critic_width": widths[place], "ihvp": "none" if place < 2 else "cg"}

    edit(suite, folder, arguments)
    return suite, figures.results_figure(suite, load_results(suite, folder))


def test_a_sweep_shows_final_returns_over_the_argument(tmp_path):
    suite, figure = swept(tmp_path)
    panel, results = axes_of(figure)[0], load_results(suite, tmp_path)
    assert legends(figure)[0] == ["PPO", "BLPO"]
    assert [panel.get_xlabel(), panel.get_xscale()] == ["critic-width", "log"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "64"]
    means = [line for line in panel.lines if line.get_marker() == "o"]
    for line, methods in zip(means, (("ppo", "nested"), ("blpo", "blpo-cg")), strict=True):
        expected = [results.of(name, "Hopper-v4")["final_return"].mean() for name in methods]
        assert list(line.get_xdata()) == [1, 64] and list(line.get_ydata()) == pytest.approx(expected)
    dots = [len(line.get_xdata()) for line in panel.lines if line.get_marker() == "."]
    assert dots == [5, 5, 5, 5]


@pytest.mark.parametrize("widths, scale", [((0, 1, 0, 64), "symlog"), ((0, 0, 0, 0), "linear"), ((0.5, 2, 0.5, 2), "linear")])
def test_the_axis_of_a_sweep_has_a_place_for_0(tmp_path, widths, scale):
    panel = axes_of(swept(tmp_path, widths)[1])[0]
    places = panel.transData.transform([(value, 0) for value in sorted({*widths})])[:, 0]
    assert panel.get_xscale() == scale and all(right - left > 10 for left, right in zip(places, places[1:]))
    assert [label.get_text() for label in panel.get_xticklabels()] == [f"{value:g}" for value in sorted({*widths})]


def test_two_lines_of_a_sweep_with_one_label_are_both_shown(tmp_path):
    suite, _ = swept(tmp_path)
    same = {name: each.model_copy(update={"label": f"PPO, {name}"}) for name, each in suite.methods.items()}
    suite = suite.model_copy(update={"methods": same})
    found = figures.families(suite, load_results(suite, tmp_path))
    assert found == {"PPO": {1: "ppo", 64: "nested"}, "PPO, blpo": {1: "blpo", 64: "blpo-cg"}}


def test_a_sweep_over_what_is_no_number_is_refused(tmp_path):
    with pytest.raises(BadSuite, match="sweep is 'depth', which is no number among the arguments"):
        swept(tmp_path, sweep="depth")


def test_the_axis_of_steps_is_logarithmic_only_where_everything_happens_early(tmp_path):
    suite = make_suite(environments=1)
    assert axes_of(drawn(suite, tmp_path / "late"))[0].get_xscale() == "linear"
    make_results(suite, tmp_path, points=40)

    def early(content, curves):
        curves["episodic_return"] = np.where(curves["global_step"] <= 2000, "100.0", "2000.0")

    edit(suite, tmp_path, early)
    figure = figures.results_figure(suite, load_results(suite, tmp_path))
    assert axes_of(figure)[0].get_xscale() == "log"


def test_the_reference_level_is_a_line_where_it_is_in_the_panel(tmp_path):
    high = drawn(make_suite(environments=1), tmp_path / "high", level=lambda *_: 1.2)
    low = drawn(make_suite(environments=1), tmp_path / "low", level=lambda *_: 0.2)
    alone = drawn(make_suite(1, 1, baselines=()), tmp_path / "alone", level=lambda *_: 0.2)
    assert [("reference level" in legends(each)[0]) for each in (high, low, alone)] == [True, False, True]


def test_nothing_is_cut_off_however_long_the_labels(tmp_path):
    suite = make_suite(environments=3)
    label = "a method with a name that does not fit into one line of a panel, nor two"
    methods = {
        name: each.model_copy(update={"label": f"{label} {name}"}) for name, each in suite.methods.items()
    }
    figure = drawn(suite.model_copy(update={"methods": methods}), tmp_path)
    renderer, parts = (
        figure.canvas.get_renderer(),
        [each for part in figure.subfigs for each in part.subfigs or [part]],
    )
    boxes = [text.get_window_extent(renderer) for axes in axes_of(figure) for text in axes.texts]
    boxes += [axes.get_tightbbox(renderer) for axes in axes_of(figure)]
    boxes += [legend.get_window_extent(renderer) for part in parts for legend in part.legends]
    for box in boxes:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1


def test_no_two_methods_of_a_committed_suite_look_the_same():
    from benchmark.suites import known_suites

    for name in known_suites():
        suite = load_suite(name, check=False)
        for group in figures.groups(list(suite.methods)):
            looks = [figures.looks(suite)[method] for method in group]
            assert len(set(looks)) == len(looks), (name, group)


def test_a_suite_without_runs_and_an_unwritable_file_are_refused(tmp_path):
    suite = make_suite(environments=1, seeds=3)
    with pytest.raises(
        BadSuite, match=re.escape(f"{tmp_path / suite.name} has no runs of the suite synthetic")
    ):
        figures.plot(suite, tmp_path)
    make_results(suite, tmp_path)
    (tmp_path / suite.name / "results.png").mkdir()
    with pytest.raises(BadSuite, match="results.png cannot be written"):
        figures.plot(suite, tmp_path)
