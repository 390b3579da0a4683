"""The scripts are single files that share blocks of code: shared ones may not drift apart, others only where allowed."""

import ast
import re
import sys
from collections import defaultdict

import pytest
import tyro
from conftest import BLPO_SCRIPTS, CONTINUOUS_SCRIPTS, DISCRETE_SCRIPTS, REPO, SCRIPTS, load, parse

EVERY = sorted(path.name for path in REPO.glob("*.py"))
BANNER = re.compile(r"\s*# ---- (.+?) -{3,}$")
PPO_AND_BLPO_DIFFER_IN = {"Docstring", "Arguments", "PPO's value loss", "Bilevel mathematics (shared)", "Optimisers", "Update"}
CONTINUOUS_AND_DISCRETE_DIFFER_IN = {"Docstring", "Arguments", "Gaussian policy (shared)", "Categorical policy (shared)"}
LABORATORY_DIFFERS_IN = {"Docstring", "Arguments", "Laboratory mathematics", "Optimisers", "Update"}
SHARED_BY_SOME = {  # every other shared block is in all scripts
    "Bilevel mathematics (shared)": BLPO_SCRIPTS,
    "Gaussian policy (shared)": CONTINUOUS_SCRIPTS,
    "Categorical policy (shared)": DISCRETE_SCRIPTS,
}


def blocks(script: str) -> dict[str, str]:
    """The blocks of a script by name, in order; what comes before the first banner is the docstring."""
    name, parts = "Docstring", {"Docstring": []}
    for line in (REPO / script).read_text().splitlines(keepends=True):
        banner = BANNER.match(line)
        if banner:
            name = banner.group(1)
            assert name not in parts, f"{script} has two blocks named {name!r}"
            parts[name] = []
        parts[name].append(line)
    return {name: "".join(lines) for name, lines in parts.items()}


def drifted(texts: dict[str, str]) -> str:
    """Which of the files with these texts differ from the most common text."""
    versions = defaultdict(list)
    for script, text in texts.items():
        versions[text].append(script)
    return " | ".join(", ".join(scripts) for scripts in sorted(versions.values(), key=len, reverse=True))


def test_shared_blocks_are_identical_in_all_scripts_that_have_them():
    per_script = {script: blocks(script) for script in SCRIPTS}
    shared = {name for found in per_script.values() for name in found if "(shared)" in name}
    assert len(shared) >= 10, f"the banners are not read any more: {sorted(shared)}"
    problems = []
    for name in sorted(shared):
        owners = SHARED_BY_SOME.get(name, SCRIPTS)
        wrong = [script for script in SCRIPTS if (name in per_script[script]) != (script in owners)]
        if wrong:
            problems.append(f"block {name!r} is missing in (or does not belong in) {', '.join(wrong)}")
        texts = {script: found[name] for script, found in per_script.items() if name in found}
        if len(set(texts.values())) > 1:
            problems.append(f"block {name!r} drifted apart: {drifted(texts)}")
    assert not problems, "\n".join(problems)


def differing(first: str, second: str) -> set[str]:
    """The names of the blocks that differ between two scripts, or that only one of them has."""
    one, other = blocks(first), blocks(second)
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_ppo_and_blpo_differ_in_these_blocks_and_no_other(kind):
    ppo, blpo = f"ppo_{kind}.py", f"blpo_{kind}.py"
    assert differing(ppo, blpo) == PPO_AND_BLPO_DIFFER_IN
    assert "PPO's value loss" not in blocks(blpo) and "Bilevel mathematics (shared)" not in blocks(ppo)


@pytest.mark.parametrize("method", ["ppo", "blpo"])
def test_continuous_and_discrete_differ_in_these_blocks_and_no_other(method):
    assert differing(f"{method}_continuous.py", f"{method}_discrete.py") == CONTINUOUS_AND_DISCRETE_DIFFER_IN


def test_the_laboratory_differs_from_the_method_in_these_blocks_and_no_other():
    assert differing("blpo_continuous.py", "blpo_continuous_ablations.py") == LABORATORY_DIFFERS_IN
    assert "Laboratory mathematics" not in blocks("blpo_continuous.py")


def arguments(script: str) -> list[tuple]:
    """Names and types of the arguments, with their ranges, in order."""
    return [(name, field.annotation, field.metadata) for name, field in load(script).Args.model_fields.items()]


def comparable(found: list[tuple]) -> list[str]:
    """The same as text: each script has its own, equal types."""
    return [re.sub(r" at 0x\w+", "", repr(each)).replace("_discrete", "").replace("_continuous", "") for each in found]


@pytest.mark.parametrize("method", ["ppo", "blpo"])
def test_continuous_and_discrete_have_the_same_arguments(method):
    """Their defaults differ, and the lines that speak of actions and tasks."""
    continuous, discrete = (comparable(arguments(f"{method}_{kind}.py")) for kind in ("continuous", "discrete"))
    assert continuous == discrete and len(continuous) > 30


def test_the_laboratory_has_the_arguments_of_the_method_first():
    method, laboratory = ([name for name, *_ in arguments(f"blpo_continuous{suffix}.py")] for suffix in ("", "_ablations"))
    assert laboratory[: len(method)] == method and len(laboratory) > len(method)


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_common_blocks_come_in_the_same_order(other):
    first, second = list(blocks(SCRIPTS[0])), list(blocks(other))
    common = set(first) & set(second)
    assert [name for name in first if name in common] == [name for name in second if name in common]


@pytest.mark.parametrize("script", EVERY)
def test_no_script_imports_another(script):
    """Each file can be copied away on its own."""
    own = {path.stem for path in REPO.glob("*.py")} | {"benchmark", "tests"}
    imported = set()
    for node in ast.walk(ast.parse((REPO / script).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{script} has a relative import"
            imported.add(node.module.split(".")[0])
    assert "torch" in imported
    assert not imported & own


@pytest.mark.parametrize("script", EVERY)
def test_every_module_that_is_used_is_imported(script):
    """A shared block may use one that the imports of a script do not have."""
    tree = ast.parse((REPO / script).read_text())
    used = {node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    missing = {name for name in used & sys.stdlib_module_names if not hasattr(load(script), name)}
    local = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert missing - local == set()


@pytest.mark.parametrize("script", EVERY)
def test_no_line_is_longer_than_110_characters(script):
    """And the code is as `ruff format --line-length 110` leaves it, so that its length is not won by packing."""
    assert [line for line in (REPO / script).read_text().splitlines() if len(line) > 110] == []


@pytest.mark.parametrize("script", EVERY)
def test_every_public_function_and_class_has_a_docstring(script):
    tree = ast.parse((REPO / script).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = [("", node) for node in tree.body] + [(f"{each.name}.", node) for each in classes for node in each.body]
    definitions = [
        (prefix + node.name, node)
        for prefix, node in found
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    assert len(definitions) > 20
    assert [name for name, node in definitions if not ast.get_docstring(node)] == []
    assert ast.get_docstring(tree), f"{script} needs a docstring"


@pytest.mark.parametrize("script", EVERY)
def test_docstring_names_a_command_that_runs_this_script(script):
    """The command in the docstring parses, so that a reader can start from it."""
    commands = re.findall(rf"^    python {re.escape(script)}(.*)$", load(script).__doc__, re.MULTILINE)
    assert commands
    for words in commands:
        words = words.partition("#")[0].split()
        parse(script, words) if hasattr(load(script), "parse_args") else tyro.cli(load(script).Args, args=words)


# ---- All scripts -----------------------------------------------------------------------------------------------
TABULAR = {"blpo_tabular.py", "sobirl_tabular.py", "stackelberg_toy.py"}
RUNS = [script for script in EVERY if script not in TABULAR | {"label_preferences.py"}]  # those that train on environments
RLHF = ["sobirl_rlhf.py", "sobirl_rlhf_atari.py"]
REQUIRED = {
    "Checked arguments (shared)": EVERY,
    "Argument types (shared)": RUNS,
    "The run: what is not the algorithm (shared)": RUNS,
    "Training: model, evaluation, film (shared)": RUNS,
    "Entry point (shared)": RUNS,
    "Environments (shared)": [script for script in RUNS if "atari" not in script],
    "Bilevel mathematics (shared)": [*BLPO_SCRIPTS, "blpo_atari.py"],
    "Atari games (shared)": [script for script in RUNS if "atari" in script],
    "Fragments (shared)": [*RLHF, "label_preferences.py"],
    "Labels by people (shared)": [*RLHF, "label_preferences.py"],
    "Preferences (shared)": RLHF,
    "Upper level: reward updates (shared)": RLHF,
}


def test_blocks_of_one_name_are_identical_in_all_scripts():
    per_script, problems = {script: blocks(script) for script in EVERY}, []
    assert len(RUNS) == 13
    for name in sorted({name for found in per_script.values() for name in found if "(shared)" in name}):
        texts = {script: found[name] for script, found in per_script.items() if name in found}
        if len(set(texts.values())) > 1:
            problems.append(f"block {name!r} drifted apart: {drifted(texts)}")
        if len(texts) == 1:
            problems.append(f"block {name!r} is in {', '.join(texts)} alone")
    problems += [f"{script} has no block {name!r}" for name, owners in REQUIRED.items() for script in owners if name not in per_script[script]]
    assert not problems, "\n".join(problems)


SIBLINGS = {
    ("ppo_atari.py", "blpo_atari.py"): {
        "Docstring", "Imports", "Arguments", "PPO's value loss", "Bilevel mathematics (shared)", "Follower",
        "Networks and optimisers", "Update",
    },
    ("stac.py", "stac_ablations.py"): {
        "Docstring", "Imports", "Arguments", "Laboratory mathematics", "Training: what the controls carry on",
        "Leader: the weight of each trajectory (Proposition 1)", "Leader: one step",
        "Follower: m steps", "Training: checkpoint",
    },
    ("stddpg.py", "stsac.py"): {"Docstring", "Arguments", "Policy"},
}  # fmt: skip


@pytest.mark.parametrize("pair", SIBLINGS)
def test_siblings_differ_in_these_blocks_and_no_other(pair):
    assert differing(*pair) == SIBLINGS[pair]
