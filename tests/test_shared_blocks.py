"""The scripts are single files that share blocks of code: shared ones may not drift apart, others only where allowed."""

import ast
import re
from collections import defaultdict

import pytest
from conftest import BLPO_SCRIPTS, CONTINUOUS_SCRIPTS, DISCRETE_SCRIPTS, REPO, SCRIPTS, load

BANNER = re.compile(r"\s*# ---- (.+?) -{3,}$")
PPO_AND_BLPO_DIFFER_IN = {
    "Docstring", "Arguments", "PPO's value loss", "Bilevel mathematics (shared)", "Batch shape", "Optimisers", "Update"
}  # fmt: skip
CONTINUOUS_AND_DISCRETE_DIFFER_IN = {
    "Docstring", "Arguments", "Gaussian policy (shared)", "Categorical policy (shared)"
}  # fmt: skip
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


@pytest.mark.parametrize("method", ["ppo", "blpo"])
def test_continuous_and_discrete_have_the_same_arguments(method):
    """Their defaults differ, and the lines that speak of actions and tasks."""
    continuous, discrete = (load(f"{method}_{kind}.py").Args.__annotations__ for kind in ("continuous", "discrete"))
    assert list(continuous.items()) == list(discrete.items())


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_common_blocks_come_in_the_same_order(other):
    first, second = list(blocks(SCRIPTS[0])), list(blocks(other))
    common = set(first) & set(second)
    assert [name for name in first if name in common] == [name for name in second if name in common]


@pytest.mark.parametrize("script", SCRIPTS)
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


@pytest.mark.parametrize("script", SCRIPTS)
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstring_names_a_command_that_runs_this_script(script):
    """The command in the docstring parses, so that a reader can start from it."""
    module = load(script)
    commands = re.findall(rf"^    python {re.escape(script)}(.*)$", module.__doc__, re.MULTILINE)
    assert commands
    for words in commands:
        module.parse_args(module.Args, words.split())


# ---- stac.py: the same blocks where they fit, the same definitions elsewhere -----------------------------------
STAC_DIFFERS_IN = {
    "Args", "make_envs",  # Discrete actions as well
    "mlp", "Agent",  # categorical actors, two widths, other initial weights
    "value_loss", "load_policy", "train",
}  # fmt: skip


def definitions(script: str) -> dict[str, str]:
    """The source of the functions and classes at the top level of a script, by name."""
    text = (REPO / script).read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


def test_stac_has_the_shared_blocks_and_definitions_of_ppo():
    ppo_blocks, stac_blocks = blocks("ppo_continuous.py"), blocks("stac.py")
    shared = {name for name in stac_blocks if "(shared)" in name}
    assert shared == {"Imports (shared)", "Entry point (shared)"}
    assert {name for name in shared if ppo_blocks.get(name) != stac_blocks[name]} == set()
    ppo, stac = definitions("ppo_continuous.py"), definitions("stac.py")
    common = ppo.keys() & stac.keys()
    assert {"Run", "parse_args", "check_ranges", "load_checkpoint", "evaluate", "film", "gae", "numpy_mlp"} <= common
    assert {name for name in common if ppo[name] != stac[name]} == STAC_DIFFERS_IN


def test_the_laboratory_of_stac_differs_in_these_definitions_and_blocks_alone():
    method, laboratory = definitions("stac.py"), definitions("stac_ablations.py")
    different = {name for name in method.keys() | laboratory.keys() if method.get(name) != laboratory.get(name)}
    added = {"released_weights", "timestep_weights", "controlled"}
    assert different == {"Args", "conjugate_gradient", "train"} | added and not added & method.keys()
    method, laboratory = blocks("stac.py"), blocks("stac_ablations.py")
    assert [name for name in laboratory if name != "Other estimators and controls"] == list(method)
    different = {name for name in method if method[name] != laboratory[name]}
    assert different == {
        "Docstring", "Arguments", "Stackelberg mathematics", "Training: set-up", "Follower: m plain gradient steps",
        "Leader: the weight of each trajectory (Proposition 1)", "Leader: one plain gradient step", "Training: log and checkpoint",
    }  # fmt: skip


@pytest.mark.parametrize("script", ["stac.py", "stac_ablations.py"])
def test_stac_documents_itself_and_stands_alone(script):
    test_every_public_function_and_class_has_a_docstring(script)
    test_docstring_names_a_command_that_runs_this_script(script)
    test_no_script_imports_another(script)
