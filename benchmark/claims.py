"""The word for a comparison: better, worse, equivalent or inconclusive; one rule for all suites."""

from benchmark.statistics import MARGIN, TAIL, Comparison
from benchmark.suites import Claim, Suite

LEAST = 5  # seeds of each method on each task below which nothing is decided (3, of paired times)

RULE = f"""Every comparison is one method's score minus another's, mean over the tasks that both have, unless one is
named. A score is 0 at a random policy's return and below, and 1 at a
[published level](../benchmark/reference.json) of the same kind of algorithm: PPO's, or
DDPG's or SAC's for the off-policy scripts. It is of the last tenth of the steps, unless "training"
(mean of the curve) or "evaluation" (most probable actions) is said. In brackets: 95 % studentised bootstrap
interval over seeds, 100,000 resamples; p: two-sided permutation test, labels exchanged within each task.

- **better**, **worse**: the interval excludes 0, and p < 0.05. **equivalent**: the interval lies inside
  ±{MARGIN:g}, and permutation tests of both bounds agree (p < 0.025). **inconclusive**: anything else, also
  where interval and p disagree, where the verdict is within the Monte Carlo error of a threshold, with
  fewer than {LEAST} seeds (with fewer than 3 there is neither interval nor p), and where runs failed.
  Times: the ratio, by pairs of equal seed, 3 pairs at least; equivalent within 10 %.
- Behind a pooled number stand its tasks alone, with \\* where their own interval and p say that there is a
  difference. Nothing is corrected for the number of comparisons: of twenty without any difference one looks
  decided.
- A *collapsed* run ends below a tenth of its peak (of the runs that ever score above 0.1). A run that
  diverged counts with the random policy's return. An interval that is far wider on one side says that a
  method has rare runs far from its others, and that these few runs cannot tell how rare.
- Words: *nested* is BLPO without the hypergradient, all else equal; *controls* are methods that keep a
  part of it, such as its weights' mean (*constant*) or its weights in another order (*permuted*). The *mixed
  term* is the part of the hypergradient that says how the policy moves the critic's targets; the *former* one
  is [another](blpo_history.md). m: critic steps for each actor step.
- Figures: every run as a thin line, the mean as a thick one, Student's 95 % interval from five runs on; below,
  the differences, all tasks (thick) and each alone, with their intervals, which may leave the axis."""


def sign(low: float, high: float, p: float) -> int:
    """1 or -1 if interval and p agree that the difference is above or below 0, else 0."""
    return (low > 0) - (high < 0) if p < 2 * TAIL else 0


def word(low: float, high: float, p: float, outside: float, margin: float) -> str:
    """The verdict of these numbers."""
    if sign(low, high, p):
        return "better" if low > 0 else "worse"
    return "equivalent" if -margin < low and high < margin and outside < TAIL else "inconclusive"


def verdict(found: Comparison | None, least: int = LEAST, failed: int = 0, margin: float = MARGIN) -> str:
    """The word in bold letters, and why where something else than the numbers makes it inconclusive."""
    if found is None or failed or found.runs[0] < least:
        why = (
            "no runs"
            if found is None
            else f"{failed} of its runs failed"
            if failed
            else f"n = {found.runs[0]}"
        )
        return f"**inconclusive** ({why})"
    said = word(found.low, found.high, found.p, found.outside, margin)
    for ends in (found.narrow, found.wide):
        for side in (-1, 1):
            drawn = (p + side * found.error(p) for p in (found.p, found.outside))
            if word(*ends, *drawn, margin) != said:
                return f"**inconclusive** (within Monte Carlo error of a threshold, here {said})"
    disagree = (found.low > 0 or found.high < 0) != (found.p < 2 * TAIL)
    return f"**{said}**" + " (interval and p disagree)" * (said == "inconclusive" and disagree)


def claims(suite: Suite) -> list[Claim]:
    """The suite's claims, each pair and measure once; without any, every method against every baseline."""
    made = suite.claims or [
        Claim(text="", better=name, than=baseline)
        for baseline in suite.baselines
        for name in suite.methods
        if name != baseline
    ]
    kept = {}
    for claim in made:
        kept.setdefault((frozenset((claim.better, claim.than)), claim.measure == "time", claim.over), claim)
    return list(kept.values())
