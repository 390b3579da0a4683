"""Suites: small TOML files that say which scripts run on which environments with which seeds and arguments.

docs/benchmark.md lists the keys of `benchmark/suites/NAME.toml`; the models below check them.
Every (method, environment, seed) is a job, and a job has one name for good: ENVIRONMENT__METHOD__SEED.
"""

import contextlib
import difflib
import importlib
import io
import json
import os
import re
import sys
import tomllib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import pydantic
from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, StrictStr

ROOT = Path(__file__).parent.parent
SUITES = Path(__file__).parent / "suites"
RESULTS = Path(__file__).parent / "results"
SCRATCH = ROOT / "runs" / "results"  # of suites elsewhere, and of those with the key scratch
EVALUATION = "charts/eval_return"  # the column of evaluations with the most probable actions
# The launcher sets these itself, so a suite may not.
RESERVED = {"env-id", "seed", "run-dir", "exp-name", "resume", "track", "wandb-project-name", "wandb-entity"}


class BadSuite(Exception):
    """One sentence that names file and key, what is wrong and what would be right; printed, exit status 2."""


# ---- What a suite file may hold --------------------------------------------------------------------------
def unique(values: tuple) -> tuple:
    """The values; raises ValueError if one is there twice."""
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"it holds {twice!r} twice, which would make the same job twice")
    return values


def pair(text: Any) -> Any:
    """The suite and the method that "SUITE.METHOD" names."""
    if not isinstance(text, str):
        return text  # a pair already
    if not all(text.partition(".")):
        raise ValueError(f"{text!r} names no suite and method, such as stddpg.actor")
    return text.split(".", 1)


def value(given: Any) -> Any:
    """An argument's value; raises ValueError for what no command line has."""
    if not isinstance(given, (bool, int, float, str)):
        raise ValueError("it must be a number, a text, true or false")
    return given


Names = Annotated[tuple[StrictStr, ...], Field(min_length=1), pydantic.AfterValidator(unique)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), pydantic.AfterValidator(unique)]
Value = Annotated[Any, pydantic.AfterValidator(value)]
Arguments = dict[str, Value]
Word = Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]  # the name of a method


class Table(BaseModel):
    """A table of a suite file: unknown keys are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_by_name=True)


class Method(Table):
    """One line of a suite's tables: a script with arguments."""

    name: str = ""
    label: StrictStr
    script: StrictStr
    arguments: Arguments = {}
    environments: Names = ()
    seeds: Seeds = ()
    by_environment: dict[str, Arguments] = Field({}, alias="arguments-by-environment")
    untimed: StrictStr = ""
    runs_of: Annotated[tuple[str, str] | None, pydantic.BeforeValidator(pair)] = Field(None, alias="runs-of")
    """(suite, method) whose runs these are; None if it has its own"""


class Claim(Table):
    """A sentence of a paper, and the comparison that judges it."""

    text: StrictStr
    better: StrictStr
    than: StrictStr
    measure: Literal["return", "above", "time"] = "return"
    over: Literal["end", "training", "evaluation"] = "end"


class Dead(Table):
    """What makes a run one that stopped learning: a diagnostic of its last rows below a bound."""

    column: StrictStr
    below: StrictFloat
    words: StrictStr


class Range(Table):
    """Numbers to draw from, whole ones if both ends are."""

    low: StrictInt | StrictFloat
    high: StrictInt | StrictFloat
    log: StrictBool = False

    @pydantic.model_validator(mode="after")
    def in_order(self):
        """Raise ValueError for an empty range, or a logarithm of what is not positive."""
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be less than high, and above 0 with log")
        return self


class Tune(Table):
    """What `python -m benchmark tune` tries, and how it chooses."""

    seeds: Seeds
    trials: Annotated[StrictInt, Field(ge=1, le=10_000)]
    space: dict[str, dict[str, Range | Annotated[tuple[Value, ...], Field(min_length=1)]]] = Field(
        min_length=1
    )
    more: tuple[Arguments, ...] = ()
    rule: Literal["score", "rank"] = "score"
    over: Literal["end", "training"] = "end"
    halving: Annotated[StrictInt, Field(ge=2)] | None = None


class Suite(Table):
    """A suite file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    path: Path
    description: StrictStr
    environments: Names
    seeds: Seeds = ()
    methods: dict[Word, Method] = Field(min_length=1)
    arguments: Arguments = {}
    grid: Annotated[StrictInt, Field(ge=1)] = 10_000
    diagnostics: tuple[StrictStr, ...] = ()
    workers: Annotated[StrictInt, Field(ge=1)] | None = None
    baselines: tuple[StrictStr, ...] = ()
    aggregate: StrictBool = True
    claims: tuple[Claim, ...] = ()
    figures: tuple[StrictStr, ...] = ()
    sweep: StrictStr = ""
    headline: StrictBool = False
    told: StrictStr = ""
    scratch: StrictBool = False
    untimed: StrictStr = ""
    dead: Dead | None = None
    restated: tuple[StrictStr, ...] = ()
    tune: Tune | None = None

    def only(self, methods: Iterable[str], environments: Iterable[str], seeds: Iterable[int]) -> "Suite":
        """The suite with some of its jobs; nothing stands for all. Raises BadSuite for what is not there."""
        known = {job.seed for job in self.shown()}
        for option, asked, there in (
            ("--methods", methods, self.methods),
            ("--environments", environments, self.environments),
            ("--seeds", seeds, known),
        ):
            for each in asked:
                if each not in there:
                    raise BadSuite(f"{option}: {self.name} does not have {each}{nearest(each, there)}")
        chosen = {}
        for name in methods or self.methods:
            method = self.methods[name]
            tasks = tuple(each for each in method.environments if each in (environments or [each]))
            numbers = tuple(each for each in method.seeds if each in (seeds or [each]))
            chosen[name] = method.model_copy(update={"environments": tasks, "seeds": numbers})
        return self.model_copy(update={"methods": chosen})

    def jobs(self) -> list["Job"]:
        """Every run to be launched: those shown but those that another suite launches."""
        return [job for job in self.shown() if self.methods[job.method].runs_of is None]

    def shown(self) -> list["Job"]:
        """Every run of its tables, seeds outermost: a suite cut short has all methods at equal seeds."""
        return [
            Job(self.name, method.name, task, seed, method.script, command_words(method, task))
            for seed in sorted({seed for method in self.methods.values() for seed in method.seeds})
            for task in self.environments
            for method in self.methods.values()
            if seed in method.seeds and task in method.environments
        ]


@dataclass(frozen=True)
class Job:
    """One training run, and its command line without the launcher's own arguments."""

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


def command_words(method: Method, environment: str) -> tuple[str, ...]:
    """The method's arguments on that environment as words: true and false become --x and --no-x."""
    words = []
    for key, value in (method.arguments | method.by_environment.get(environment, {})).items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        else:
            words += [f"--{key}", str(value)]
    return tuple(words)


def same_run(one: list[str], other: list[str], restated: Iterable[str] = ()) -> bool:
    """Whether two commands are equal but for the name of the experiment and the restated arguments."""
    free = ("exp-name", *restated)
    return without(free, one) == without(free, other)


def without(arguments: Iterable[str], command: list[str]) -> str:
    """A command in one line, without these arguments and their values; a flag, --x or --no-x, has none."""
    flags = {f"--{each}" for each in arguments} | {f"--no-{each}" for each in arguments}
    kept, dropped = [], False
    for word in command:
        dropped = word in flags or (dropped and not word.startswith("--"))
        if not dropped:
            kept.append(word)
    return " ".join(kept)


# ---- Reading a file --------------------------------------------------------------------------------------
def nearest(word: object, known: Iterable) -> str:
    """The known words closest to `word`, in words."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(str(word), known, n=3)
    return f"; the nearest are {', '.join(near)}" if near else f"; there are {', '.join(known)}"


def first_sentence(error: pydantic.ValidationError) -> str:
    """What pydantic holds against a table first: the key, and what is wrong with it."""
    wrong = error.errors()[0]
    parts = [part for part in wrong["loc"] if "[" not in str(part) or part == "[key]"]  # no names of types
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    said = {"missing": "this key is missing", "extra_forbidden": "this key is unknown"}.get(wrong["type"])
    message = said or wrong["msg"].removeprefix("Value error, ")
    return f"{key.removeprefix('.')}: {message}".removeprefix(": ")


def known_suites() -> list[str]:
    """The names of the suites of this repository."""
    return sorted(path.stem for path in SUITES.glob("*.toml"))


def load_suite(name: str, check: bool = True) -> Suite:
    """The suite of that name, or at that path if it ends in .toml.

    With `check`, every script, argument and environment is tried as the script itself would. Raises BadSuite.
    """
    path = Path(name) if name.endswith(".toml") else SUITES / f"{name}.toml"
    try:
        text = path.read_bytes()
    except OSError as error:
        if name.endswith(".toml"):
            raise BadSuite(f"the suite {name} cannot be read: {error.strerror}") from None
        raise BadSuite(f"there is no suite {name!r}{nearest(name, known_suites())}") from None
    try:
        table = tomllib.loads(text.decode())
        if "name" in table or "path" in table:
            raise ValueError("name, path: these keys are unknown")
        suite = Suite.model_validate(table | {"name": path.stem, "path": path})
        methods, environments = {}, list(suite.environments)
        for key, method in suite.methods.items():
            if method.name:
                raise ValueError(f"methods.{key}.name: this key is unknown")
            own = {name: getattr(method, name) or getattr(suite, name) for name in INHERITED}
            own |= {"name": key, "arguments": suite.arguments | method.arguments}
            methods[key] = method.model_copy(update=own)
            environments += [each for each in own["environments"] if each not in environments]
        suite = suite.model_copy(update={"methods": methods, "environments": tuple(environments)})
        check_names(suite)
        check_levels(suite)
        if check:
            check_jobs(suite)
            check_runs_of(suite)
    except pydantic.ValidationError as error:
        raise BadSuite(f"{path.name}: {first_sentence(error)}") from None
    except ValueError as error:  # no TOML, no UTF-8, or one of the checks
        raise BadSuite(f"{path.name}: {error}") from None
    return suite


INHERITED = ("environments", "seeds", "untimed")  # what a method has from its suite


def check_names(suite: Suite) -> None:
    """Raise ValueError, with the key, where a part of a suite names what another part does not have."""

    def known(where: str, word: str, words: Iterable[str], what: str) -> None:
        if word not in words:
            raise ValueError(f"{where} names {word!r}, which is no {what} of the suite{nearest(word, words)}")

    for name, method in suite.methods.items():
        if not method.seeds:
            raise ValueError(f"methods.{name}.seeds: this key is missing, here and in the suite")
        for each in method.by_environment:
            known(f"methods.{name}.arguments-by-environment", each, method.environments, "environment")
    for key in ("baselines", "figures"):
        for each in getattr(suite, key):
            known(key, each, suite.methods, "method")
    for index, claim in enumerate(suite.claims):
        known(f"claims[{index}].better", claim.better, suite.methods, "method")
        known(f"claims[{index}].than", claim.than, suite.methods, "method")
        if claim.over == "evaluation":
            known(f"claims[{index}].over", EVALUATION, suite.diagnostics, "diagnostic")
    if suite.dead is not None:
        known("dead.column", suite.dead.column, suite.diagnostics, "diagnostic")
    names = [job.name for job in suite.shown()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"environments: two of them make the same job {twice}")
    if suite.tune is not None:
        for name in suite.tune.space:
            known("tune.space", name, suite.methods, "method")
        reported = {job.seed for job in suite.shown()}
        for seed in reported.intersection(suite.tune.seeds):
            raise ValueError(
                f"tune.seeds holds {seed}, a seed of the suite; tune on seeds that it does not report"
            )


def check_levels(suite: Suite) -> None:
    """Raise ValueError if returns are to be compared on an environment without levels: before the runs."""
    from benchmark.reference import REFERENCE, load_reference

    needed, levels = {}, load_reference()
    for index, claim in enumerate(suite.claims):
        pair = suite.methods[claim.better], suite.methods[claim.than]
        for each in pair[0].environments if claim.measure != "time" else ():
            if each in pair[1].environments:
                needed.setdefault(each, f"claims[{index}]")
    for name in suite.tune.space if suite.tune is not None else ():
        needed = dict.fromkeys(suite.methods[name].environments, "tune") | needed
    for environment, key in needed.items():
        if environment not in levels:
            lacks = f"{REFERENCE.name} has no levels of {environment} to normalise returns with"
            raise ValueError(f"{key}: {lacks}; add them there or leave this out")


def check_runs_of(suite: Suite) -> None:
    """Raise ValueError unless every run that a method takes from another suite is launched there, by an equal
    command, on an equal grid, and timed where it is timed here."""
    for method in suite.methods.values():
        if method.runs_of is None:
            continue
        key, (name, there) = f"methods.{method.name}.runs-of", method.runs_of
        if name not in known_suites():
            raise ValueError(f"{key}: there is no suite {name!r}{nearest(name, known_suites())}")
        other = load_suite(name, check=False)
        if there not in other.methods:
            raise ValueError(f"{key}: {name} has no method {there!r}{nearest(there, other.methods)}")
        if other.grid != suite.grid:
            raise ValueError(f"{key}: the grid is {other.grid} in {name}, {suite.grid} here; make them equal")
        if other.methods[there].untimed and not method.untimed:
            raise ValueError(f"{key}: the runs are untimed in {name}; give the method the same key untimed")
        launched = {(job.environment, job.seed): job.command for job in other.jobs() if job.method == there}
        for job in suite.shown():
            command = launched.get((job.environment, job.seed))
            if job.method == method.name and (command is None or not same_run(job.command, command)):
                what = "does not launch it" if command is None else f"launches it as: {' '.join(command)}"
                raise ValueError(f"{key} takes {job.environment}, seed {job.seed}, from {name}, which {what}")


# ---- Asking the scripts ----------------------------------------------------------------------------------
def check_jobs(suite: Suite) -> None:
    """Let each script judge its arguments and environments, as it would at launch. Raises ValueError.

    This makes every environment once, and so imports the module of an id such as module:Name-v0.
    """
    tried = set()  # (script, environment, its keywords, whether it is filmed)
    for method in suite.methods.values():
        key, judged = f"methods.{method.name}", {}
        module = load_script(key, method.script)
        for name in {*method.arguments}.union(*method.by_environment.values()):
            if name.replace("_", "-") in RESERVED:
                raise ValueError(f"{key}.arguments.{name}: this argument is the launcher's own; leave it out")
        for environment in method.environments:
            words = command_words(method, environment)
            if words not in judged:
                judged[words] = check_command(f"{key}.arguments", module, ["--env-id", environment, *words])
            args = judged[words]
            filmed = getattr(args, "capture_video", False)
            case = method.script, environment, getattr(args, "env_kwargs", ""), filmed
            if hasattr(module, "make_envs") and case not in tried:
                check_environment(key, module, args, environment)
                tried.add(case)


def load_script(key: str, script: str):
    """The module of a script at the top level of the repository. Raises ValueError."""
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    if script not in scripts:
        raise ValueError(f"{key}.script: there is no script {script!r}{nearest(script, scripts)}")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    module = importlib.import_module(Path(script).stem)
    if not hasattr(module, "parse_args"):
        raise ValueError(f"{key}.script: {script} trains on no environment")
    return module


def check_command(key: str, module, words: list[str]):
    """The arguments that the script makes of these words. Raises ValueError if it refuses them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return module.parse_args(words)
    except module.BadInput as error:
        raise ValueError(f"{key}: {module.__name__}.py refuses them: {error}") from None
    except SystemExit:
        text = " ".join(re.sub("[─│╭╮╰╯]", " ", said.getvalue()).split()).partition("For full help")[0]
        raise ValueError(f"{key}: {module.__name__}.py cannot read {' '.join(words)}: {text}") from None


def check_environment(key: str, module, args, environment: str) -> None:
    """Raise ValueError if the script cannot make the environment, or cannot film it where it is to."""
    one = args.model_copy(update={"env_id": environment, "num_envs": 1})
    games = "num_envs" in module.make_envs.__code__.co_varnames[: module.make_envs.__code__.co_argcount]
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            made = module.make_envs(one, 1, 0) if games else module.make_envs(one, 0)
            (made[0] if isinstance(made, tuple) else made).close()
    except module.BadInput as error:
        raise ValueError(f"{key}.environments: {error}") from None
    if getattr(args, "capture_video", False):
        try:
            os.environ.setdefault("MUJOCO_GL", "egl")  # as the scripts do
            with warnings.catch_warnings(action="ignore"):
                env = gym.make(environment, render_mode="rgb_array", **json.loads(args.env_kwargs))
                env.reset()
                env.render()
            env.close()
        except Exception as error:  # whatever the task, MuJoCo or the driver raises
            words = f"{key}.arguments.capture-video: {environment} cannot be filmed here"
            raise ValueError(f"{words}: {' '.join(str(error).split())}") from None
