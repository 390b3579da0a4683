"""Numbers and names as the words and tables of `docs/results.md` and the figures."""

import math
import re
from collections.abc import Iterable


def number(value: float, sign: bool = False) -> str:
    """Three digits or all before the point: 2383, 41.5, -0.12, 0.012; with `sign` also +0.12."""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 3
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return re.sub(r"[-+]", "", text) if float(text) == 0 else text


def probability(p: float) -> str:
    """p = 0.03, p < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def short(environment: str) -> str:
    """An environment's name without its module and its version."""
    return re.sub(r"^.*:|-v\d+$", "", environment)


def spread(numbers: Iterable[int]) -> str:
    """5, or 3-5 where they differ."""
    numbers = list(numbers)
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"


def table(head: list[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table and an empty line."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]
