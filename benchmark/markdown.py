"""Numbers, intervals and lists of jobs as the words and tables of `docs/results.md`."""

from collections.abc import Iterable

from benchmark.statistics import Interval


def number(value: float, sign: bool = False) -> str:
    """Three digits or all before the point: 2383, 41.5, -0.12; with `sign` also +0.12."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "") if float(text) == 0 else text


def bracketed(interval: Interval, sign: bool = False) -> str:
    """estimate [low, high]"""
    estimate, low, high = (number(float(value), sign) for value in interval)
    return f"{estimate} [{low}, {high}]"


def table(head: list[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table, an empty line before and after it."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return ["", lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def listed(words: Iterable[str]) -> str:
    """Words with commas, or none."""
    return ", ".join(words) or "none"


def jobs_in_words(names: Iterable[str]) -> str:
    """Jobs by environment and method: "Hopper-v4: ppo (1 2), blpo (1)" for Hopper-v4__ppo__1 and so on, or none."""
    seeds: dict[str, dict[str, list[str]]] = {}
    for name in names:
        environment, method, seed = name.rsplit("__", 2)
        seeds.setdefault(environment, {}).setdefault(method, []).append(seed)
    return "; ".join(
        f"{environment}: " + ", ".join(f"{method} ({' '.join(each)})" for method, each in methods.items())
        for environment, methods in seeds.items()
    ) or "none"  # fmt: skip
