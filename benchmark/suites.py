"""Suites: small TOML files that say which scripts run on which environments with which seeds and arguments.

A suite `benchmark/suites/NAME.toml`:

    description = "what the suite is for"
    environments = ["Hopper-v4", "Walker2d-v4"]
    seeds = [1, 2, 3]
    grid = 10000                       # steps between two points of a collected curve
    diagnostics = ["bilevel/cosine"]   # columns of metrics.csv that collect keeps as well (default: none)
    workers = 1                        # at most so many runs at a time (default: as many as --workers says)
    baselines = ["ppo"]                # methods that every other one is compared with (default: none)
    aggregate = false                  # whether tables and figures pool the environments (default: true)
    figures = ["ppo", "blpo"]          # methods that the figures show (default: all, as in the tables)
    headline = true                    # whether its section is the first of the report (default: false)
    untimed = "the machine was busy"   # why tables and figures leave out the wall-clock times (default: they do not)
    unready = "step sizes are open"    # why nothing of it may be launched yet (default: it may; --dry-run always works)
    restated = ["learning-rate"]       # arguments, by their names then or now, that the collected runs had by default or under another
                                       # name: methods have them here as those runs did, and commands are compared without them (optional)

    [dead]                             # runs to be named, and claims to be judged without them as well (optional):
    column = "losses/actor_gradient_norm"  # those in which this diagnostic, mean of the last 10 % of the rows of the csv file,
    below = 1e-8                       # is smaller than that
    words = "dead actor"               # what the report calls them

    [[gates]]                          # when something is claimed of a method at all (optional): its claims leave out
    method = "critic"                  # an environment on which this diagnostic, mean over the rows of a run, then over the runs,
    column = "bilevel/plain_fraction"
    over = "bilevel/direct_norm"       # divided by that of this one (optional),
    most = 0.2                         # is larger than that, or
    least = 0.1                        # smaller than that

    [arguments]                        # of every script, by their names on the command line
    total-timesteps = 300000

    [methods.ppo]                      # one table a method, in the order of the tables and legends
    label = "PPO"                      # what tables and legends call it
    script = "ppo_continuous.py"
    arguments = { num-minibatches = 8 }
    environments = ["Hopper-v4"]       # instead of the suite's (optional)
    seeds = [1]                        # instead of the suite's (optional)
    untimed = "it shared its cores"    # why tables and figures leave out this method's times (optional)
    runs-of = "stddpg.actor"           # not launched: its runs are those of that suite and method, of equal commands (optional)

    [methods.ppo.arguments-by-environment.Hopper-v4]
    learning-rate = 1e-3               # on this environment (optional)

    [[claims]]                         # judged by `python -m benchmark report` (optional)
    text = "BLPO at least as good as PPO"
    better = "blpo"
    than = "ppo"
    measure = "return"                 # at least as good; "above": better; "time": takes less wall-clock time
    over = "end"                       # the return of the last 10 % of the steps; "training": of all of them;
                                       # "evaluation": of the evaluations in the last 10 % of the steps

Every (method, environment, seed) is a job, and a job has one name for good: ENVIRONMENT__METHOD__SEED.
"""

import contextlib
import difflib
import importlib
import inspect
import io
import json
import math
import re
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmark.reference import REFERENCE, load_reference

ROOT = Path(__file__).parent.parent
SUITES = Path(__file__).parent / "suites"
RESULTS = Path(__file__).parent / "results"
EVALUATION = "charts/eval_return"  # the column of evaluations with the most probable actions
# The launcher sets these itself, so a suite may not.
RESERVED = {"env_id", "seed", "run_dir", "exp_name", "resume", "track", "wandb_project_name", "wandb_entity"}


class BadSuite(Exception):
    """One sentence that names file and key, what is wrong and what would be right; printed, exit status 2."""


@dataclass(frozen=True)
class Method:
    """One line of a suite's tables: a script with arguments."""

    name: str
    label: str
    script: str
    arguments: dict[str, Any]
    environments: tuple[str, ...]
    seeds: tuple[int, ...]
    by_environment: dict[str, dict[str, Any]] = field(default_factory=dict)
    untimed: str = ""
    runs_of: tuple[str, str] | None = None
    """(suite, method) whose runs these are; None if it has its own"""


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and the comparison that judges it."""

    text: str
    better: str
    than: str
    measure: str = "return"
    over: str = "end"


@dataclass(frozen=True)
class Job:
    """One training run: method, environment, seed, and its command line without the launcher's own arguments."""

    suite: str
    method: str
    environment: str
    seed: int
    script: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """ENVIRONMENT__METHOD__SEED, safe as a file's name."""
        return re.sub(r"[/:\\\s]", "_", f"{self.environment}__{self.method}__{self.seed}")

    @property
    def command(self) -> list[str]:
        """The words after `python`: the script and everything that decides its result."""
        here = ["--env-id", self.environment, "--seed", str(self.seed), "--exp-name", self.method]
        return [self.script, *here, *self.arguments]


@dataclass(frozen=True)
class Dead:
    """What makes a run one that stopped learning: a diagnostic of its last rows below a bound."""

    column: str
    below: float
    words: str


@dataclass(frozen=True)
class Gate:
    """Bounds of a diagnostic of a method, or of a quotient of two; beyond them nothing is claimed of it on that environment."""

    method: str
    column: str
    over: str | None = None
    least: float = -math.inf
    most: float = math.inf


@dataclass(frozen=True)
class Suite:
    """A suite file, checked."""

    name: str
    path: Path
    description: str
    environments: tuple[str, ...]
    methods: dict[str, Method]
    grid: int
    diagnostics: tuple[str, ...]
    workers: int | None
    baselines: tuple[str, ...]
    aggregate: bool
    claims: tuple[Claim, ...]
    figures: tuple[str, ...] = ()
    headline: bool = False
    unready: str = ""
    dead: Dead | None = None
    gates: tuple[Gate, ...] = ()
    restated: tuple[str, ...] = ()

    def only(self, methods: tuple[str, ...], environments: tuple[str, ...], seeds: tuple[int, ...]) -> "Suite":
        """The suite with some of its jobs; an empty tuple stands for all. Raises BadSuite for what it does not have."""
        known = {job.seed for job in self.shown()}
        for words, asked, there in (
            ("--methods", methods, self.methods), ("--environments", environments, self.environments), ("--seeds", seeds, known),
        ):  # fmt: skip
            for each in asked:
                if each not in there:
                    raise BadSuite(f"{words} names {each}, which {self.name} does not have{nearest(str(each), there)}")
        chosen = {
            name: replace(
                method,
                environments=tuple(each for each in method.environments if not environments or each in environments),
                seeds=tuple(seed for seed in method.seeds if not seeds or seed in seeds),
            )
            for name, method in self.methods.items()
            if not methods or name in methods
        }
        return replace(self, methods=chosen)

    def jobs(self) -> list[Job]:
        """Every run to be launched: those shown but those that another suite launches."""
        return [job for job in self.shown() if self.methods[job.method].runs_of is None]

    def shown(self) -> list[Job]:
        """Every run of its tables: seeds outermost, so that a suite that is cut short has every method at the same seeds."""
        seeds = sorted({seed for method in self.methods.values() for seed in method.seeds})
        return [
            Job(self.name, method.name, environment, seed, method.script, command_words(method, environment))
            for seed in seeds
            for environment in self.environments
            for method in self.methods.values()
            if seed in method.seeds and environment in method.environments
        ]


def command_words(method: Method, environment: str) -> tuple[str, ...]:
    """The method's arguments on that environment as words: true and false become --x and --no-x."""
    words = []
    for key, value in (method.arguments | method.by_environment.get(environment, {})).items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        else:
            words += [f"--{key}", str(value)]
    return tuple(words)


# ---- Reading a file --------------------------------------------------------------------------------------------
SUITE_KEYS = {
    "description": str, "environments": list, "seeds": list, "grid": int, "diagnostics": list, "workers": int,
    "baselines": list, "aggregate": bool, "figures": list, "headline": bool, "untimed": str, "unready": str, "dead": dict,
    "gates": list, "restated": list, "arguments": dict, "methods": dict, "claims": list,
}  # fmt: skip
METHOD_KEYS = {
    "label": str, "script": str, "arguments": dict, "environments": list, "seeds": list, "arguments-by-environment": dict,
    "untimed": str, "runs-of": str,
}  # fmt: skip
DEAD_KEYS = {"column": str, "below": float, "words": str}
GATE_KEYS = {"method": str, "column": str, "over": str, "least": float, "most": float}
CLAIM_KEYS = {"text": str, "better": str, "than": str, "measure": str, "over": str}
TYPE_NAMES = {
    str: "a text", list: "a list", int: "a whole number", float: "a number with a point or an exponent", bool: "true or false",
    dict: "a table",
}  # fmt: skip


def nearest(word: str, known) -> str:
    """The known words closest to `word`, in words."""
    near = difflib.get_close_matches(word, [str(each) for each in known], n=3)
    return f"; the nearest are {', '.join(near)}" if near else f"; there are {', '.join(sorted(map(str, known)))}"


def check_table(where: str, table: dict, keys: dict[str, type], required: tuple[str, ...]) -> None:
    """Raise BadSuite for an unknown or missing key, or a value of the wrong type."""
    for key, value in table.items():
        if key not in keys:
            raise BadSuite(f"{where}: the key {key!r} is unknown{nearest(key, keys)}")
        if not isinstance(value, keys[key]) or (keys[key] is int and isinstance(value, bool)):
            raise BadSuite(f"{where}: {key} must be {TYPE_NAMES[keys[key]]}, not {value!r}")
    for key in required:
        if key not in table:
            raise BadSuite(f"{where}: the key {key!r} is missing")


def check_seeds(where: str, seeds: list) -> tuple[int, ...]:
    """Raise BadSuite unless they are whole numbers from 0, at least one, none twice."""
    if not seeds:
        raise BadSuite(f"{where}: seeds is empty; name at least one")
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise BadSuite(f"{where}: seeds holds {seed!r}; a seed is a whole number from 0")
        if seeds.count(seed) > 1:
            raise BadSuite(f"{where}: seeds holds {seed} twice, which would make the same job twice")
    return tuple(seeds)


def check_environments(where: str, environments: list) -> tuple[str, ...]:
    """Raise BadSuite unless they are texts, at least one, none twice."""
    if not environments:
        raise BadSuite(f"{where}: environments is empty; name at least one")
    for environment in environments:
        if not isinstance(environment, str):
            raise BadSuite(f"{where}: environments holds {environment!r}; an environment is a text such as \"Hopper-v4\"")
        if environments.count(environment) > 1:
            raise BadSuite(f"{where}: environments holds {environment} twice, which would make the same job twice")
    return tuple(environments)


def first_sentence(error: ValidationError) -> str:
    """What pydantic holds against a table first: the key, and what is wrong with it."""
    wrong = error.errors()[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in wrong["loc"]).removeprefix(".")
    return f"{where}: {wrong['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def known_suites() -> list[str]:
    """The names of the suites of this repository."""
    return sorted(path.stem for path in SUITES.glob("*.toml"))


def load_suite(name: str, check: bool = True) -> Suite:
    """The suite of that name, or at that path if it ends in .toml.

    With `check`, every script, argument and environment is tried as the script itself would. Raises BadSuite.
    """
    path = Path(name) if name.endswith(".toml") else SUITES / f"{name}.toml"
    try:
        text = path.read_text()
    except OSError as error:
        if name.endswith(".toml"):
            raise BadSuite(f"the suite {name} cannot be read: {error.strerror}") from error
        raise BadSuite(f"there is no suite {name!r}{nearest(name, known_suites())}") from error
    where = path.name
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadSuite(f"{where}: this is no TOML: {error}") from error
    check_table(where, table, SUITE_KEYS, ("description", "environments", "seeds", "methods"))
    environments = check_environments(where, table["environments"])
    seeds = check_seeds(where, table["seeds"])
    if not table["methods"]:
        raise BadSuite(f"{where}: methods is empty; add a table [methods.NAME]")
    for key in ("grid", "workers"):
        if table.get(key, 1) < 1:
            raise BadSuite(f"{where}: {key} is {table[key]}, it must be at least 1")
    methods, all_environments = {}, list(environments)
    for method, entry in table["methods"].items():
        inside = f"{where}, methods.{method}"
        if not re.fullmatch(r"[a-z0-9-]+", method):
            raise BadSuite(f"{inside}: the name of a method is made of small letters, digits and hyphens")
        if not isinstance(entry, dict):
            raise BadSuite(f"{inside}: this must be a table")
        check_table(inside, entry, METHOD_KEYS, ("label", "script"))
        own_environments = check_environments(inside, entry.get("environments", list(environments)))
        all_environments += [each for each in own_environments if each not in all_environments]
        by_environment = entry.get("arguments-by-environment", {})
        for environment, arguments in by_environment.items():
            if environment not in own_environments:
                known = nearest(environment, own_environments)
                raise BadSuite(f"{inside}: arguments-by-environment names {environment}, which it does not run on{known}")
            if not isinstance(arguments, dict):
                raise BadSuite(f"{inside}: arguments-by-environment.{environment} must be a table")
        methods[method] = Method(
            method,
            entry["label"],
            entry["script"],
            table.get("arguments", {}) | entry.get("arguments", {}),
            own_environments,
            check_seeds(inside, entry.get("seeds", list(seeds))),
            by_environment,
            entry.get("untimed", table.get("untimed", "")),
            read_runs_of(inside, entry["runs-of"]) if "runs-of" in entry else None,
        )
    for key in ("baselines", "figures"):
        for method in table.get(key, []):
            if method not in methods:
                raise BadSuite(f"{where}: {key} names {method!r}, which is no method of the suite{nearest(method, methods)}")
    claims = []
    for index, entry in enumerate(table.get("claims", [])):
        inside = f"{where}, claims[{index}]"
        check_table(inside, entry, CLAIM_KEYS, ("text", "better", "than"))
        for key in ("better", "than"):
            if entry[key] not in methods:
                raise BadSuite(f"{inside}: {key} names {entry[key]!r}, which is no method of the suite{nearest(entry[key], methods)}")
        if entry.get("measure", "return") not in ("return", "above", "time"):
            raise BadSuite(f"{inside}: measure is {entry['measure']!r}, it must be \"return\", \"above\" or \"time\"")
        if entry.get("over", "end") not in ("end", "training", "evaluation"):
            raise BadSuite(f"{inside}: over is {entry['over']!r}, it must be \"end\", \"training\" or \"evaluation\"")
        if entry.get("over") == "evaluation" and EVALUATION not in table.get("diagnostics", []):
            raise BadSuite(f"{inside}: over evaluation takes {EVALUATION}, which is none of the suite's diagnostics; add it there")
        claims.append(Claim(**entry))
    dead = None
    if "dead" in table:
        check_table(f"{where}, dead", table["dead"], DEAD_KEYS, tuple(DEAD_KEYS))
        dead = Dead(**table["dead"])
        if dead.column not in table.get("diagnostics", []):
            raise BadSuite(f"{where}, dead: column is {dead.column!r}, which is none of the suite's diagnostics; add it there")
    gates = []
    for index, entry in enumerate(table.get("gates", [])):
        inside = f"{where}, gates[{index}]"
        check_table(inside, entry, GATE_KEYS, ("method", "column"))
        if not {"least", "most"} & entry.keys():
            raise BadSuite(f"{inside}: it has no bound; add least or most")
        if entry["method"] not in methods:
            raise BadSuite(f"{inside}: method is {entry['method']!r}, which is none of the suite{nearest(entry['method'], methods)}")
        for key in ("column", "over"):
            if key in entry and entry[key] not in table.get("diagnostics", []):
                raise BadSuite(f"{inside}: {key} is {entry[key]!r}, which is none of the suite's diagnostics; add it there")
        gates.append(Gate(**entry))
    suite = Suite(
        path.stem,
        path,
        table["description"],
        tuple(all_environments),
        methods,
        table.get("grid", 10_000),
        tuple(table.get("diagnostics", [])),
        table.get("workers"),
        tuple(table.get("baselines", [])),
        table.get("aggregate", True),
        tuple(claims),
        tuple(table.get("figures", [])),
        table.get("headline", False),
        table.get("unready", ""),
        dead,
        tuple(gates),
        tuple(table.get("restated", [])),
    )
    check_levels(suite, where)
    if check:
        check_jobs(suite, where)
        check_runs_of(suite, where)
    return suite


def read_runs_of(where: str, text: str) -> tuple[str, str]:
    """The suite and the method that "SUITE.METHOD" names. Raises BadSuite."""
    suite, point, method = text.partition(".")
    if not suite or not point or not method:
        raise BadSuite(f"{where}: runs-of is {text!r}; it names a suite and a method, such as \"stddpg.actor\"")
    return suite, method


def check_runs_of(suite: Suite, where: str) -> None:
    """Raise BadSuite unless every run that a method takes from another suite is launched there, by an equal command, on an
    equal grid, and timed where it is timed here."""
    for method in suite.methods.values():
        if method.runs_of is None:
            continue
        inside, (name, there) = f"{where}, methods.{method.name}", method.runs_of
        if name not in known_suites():
            raise BadSuite(f"{inside}: runs-of names the suite {name!r}, which there is not{nearest(name, known_suites())}")
        other = load_suite(name, check=False)
        if there not in other.methods:
            raise BadSuite(f"{inside}: runs-of names {there!r}, which is no method of {name}{nearest(there, other.methods)}")
        if other.grid != suite.grid:
            grids = f"runs on the grid {other.grid} of {name}, but the suite's is {suite.grid}"
            raise BadSuite(f"{inside}: runs-of takes {grids}; make them equal")
        if other.methods[there].untimed and not method.untimed:
            raise BadSuite(f"{inside}: runs-of takes runs that are untimed in {name}; give it the same key untimed")
        launched = {(job.environment, job.seed): job for job in other.jobs() if job.method == there}
        for job in suite.shown():
            source = launched.get((job.environment, job.seed))
            if job.method == method.name and (source is None or not same_run(job.command, source.command)):
                what = "does not launch it" if source is None else f"launches it as: {' '.join(source.command)}"
                raise BadSuite(f"{inside}: runs-of takes {job.environment}, seed {job.seed}, from {name}, which {what}")


def same_run(one: list[str], other: list[str], restated: Iterable[str] = ()) -> bool:
    """Whether two commands are equal but for the name of the experiment and the restated arguments."""
    free = ("exp-name", *restated)
    return without(free, one) == without(free, other)


def without(arguments: Iterable[str], command: list[str]) -> str:
    """A command in one line, without these arguments and their values."""
    kept, words = [], iter(command)
    for word in words:
        if word.removeprefix("--") in arguments:
            next(words, None)
        else:
            kept.append(word)
    return " ".join(kept)


def check_levels(suite: Suite, where: str) -> None:
    """Raise BadSuite if a claim of returns is made on an environment without levels: found out before the runs."""
    needed = []
    for claim in suite.claims:
        if claim.measure != "time":
            pair = suite.methods[claim.better].environments, suite.methods[claim.than].environments
            needed += [each for each in pair[0] if each in pair[1]]
    levels = load_reference()
    for environment in needed:
        if environment not in levels:
            raise BadSuite(
                f"{where}: claims compare returns on {environment}, which {REFERENCE.name} has no levels of to normalise them"
                " with; add them there or leave out the claims"
            )


# ---- Asking the scripts ----------------------------------------------------------------------------------------
def load_script(where: str, script: str):
    """The module of a script at the top level of the repository. Raises BadSuite."""
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    if script not in scripts:
        raise BadSuite(f"{where}: there is no script {script!r}{nearest(script, scripts)}")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(Path(script).stem)


def check_jobs(suite: Suite, where: str) -> None:
    """Let each script judge its arguments and environments, as it would at launch. Raises BadSuite."""
    for method in suite.methods.values():
        inside = f"{where}, methods.{method.name}"
        module = load_script(inside, method.script)
        known = set(inspect.get_annotations(module.Args)) - RESERVED
        for arguments in (method.arguments, *method.by_environment.values()):
            for key in arguments:
                if key.replace("-", "_") in RESERVED:
                    raise BadSuite(f"{inside}: the argument {key} is the launcher's own; leave it out")
                if key.replace("-", "_") not in known:
                    options = nearest(key, [name.replace("_", "-") for name in known])
                    raise BadSuite(f"{inside}: {method.script} has no argument {key!r}{options}")
        judged = {}
        for environment in method.environments:
            words = command_words(method, environment)
            if words not in judged:
                judged[words] = check_command(inside, module, method.script, ["--env-id", environment, *words])
            check_environment(inside, module, judged[words], environment)


def check_command(where: str, module, script: str, words: list[str]):
    """The arguments that the script makes of these words. Raises BadSuite if it refuses them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return module.parse_args(words)
    except module.BadInput as error:
        raise BadSuite(f"{where}: {script} refuses its arguments: {error}") from error
    except SystemExit as error:
        raise BadSuite(f"{where}: {script} cannot read the arguments {' '.join(words)}: {last_words(said.getvalue())}") from error


def last_words(text: str) -> str:
    """What a command-line parser said, without its box."""
    words = " ".join(re.sub(r"[─│╭╮╰╯]", " ", text).split())
    return re.sub(r"For full helptext.*", "", words).strip() or "it says nothing"


ENVIRONMENTS_TRIED: dict[tuple[str, str, str], str | None] = {}  # (script, environment, its keywords) -> what is wrong with it


def check_environment(where: str, module, args, environment: str) -> None:
    """Raise BadSuite if the script cannot make the environment, with the keywords that `args` have for it."""
    if not hasattr(module, "make_envs"):
        return
    key = module.__name__, environment, getattr(args, "env_kwargs", "")
    if key not in ENVIRONMENTS_TRIED:
        one = args.model_copy(update={"env_id": environment, "num_envs": 1})
        words = (one, 1, 0) if "num_envs" in inspect.signature(module.make_envs).parameters else (one, 0)  # of games
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                made = module.make_envs(*words)
                (made[0] if isinstance(made, tuple) else made).close()
            ENVIRONMENTS_TRIED[key] = None
        except module.BadInput as error:
            ENVIRONMENTS_TRIED[key] = str(error)
    if ENVIRONMENTS_TRIED[key]:
        raise BadSuite(f"{where}: {ENVIRONMENTS_TRIED[key]}")


def read_json(path: Path) -> dict | None:
    """The content of a json file; None if it is not there or was cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
