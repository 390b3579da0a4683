"""Every mistake on a command line ends with status 2 and one sentence that names it, and leaves nothing behind."""

import importlib
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import typing

import filelock
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    BLPO_SCRIPTS, CONTINUOUS_SCRIPTS, DISCRETE_SCRIPTS, REPO, SCRIPTS, command, environment, for_actions, load, train,
)  # fmt: skip

LAB = "blpo_continuous_ablations.py"
ONE = "ppo_continuous.py"  # for what is in a shared block


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def assert_one_line(status: int, err: str, *fragments: str) -> None:
    """Status 2 and one line "error: ...", with these fragments."""
    assert status == 2, err
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), f"not one line:\n{err}"
    for fragment in fragments:
        assert fragment in lines[0], f"{fragment!r} is not in: {lines[0]}"


def assert_one_sentence(status: int, err: str, *fragments: str) -> None:
    """The same, and the line is one sentence."""
    assert_one_line(status, err, *fragments)
    assert not re.search(r"[.?!]['\"]?[;,]? +\S", err.replace("...", "")), f"more than one sentence: {err}"


# ---- Numbers ---------------------------------------------------------------------------------------------------
def bounds(script: str) -> dict[str, dict]:
    """The int and float fields of Args and their bounds, as pydantic has them: name -> {"type", "gt", "ge", "lt", "le"}."""
    found = {}
    for name, field in load(script).Args.model_fields.items():
        for kind in [field.annotation, *typing.get_args(field.annotation)]:
            metadata = [*field.metadata, *getattr(kind, "__metadata__", ())]
            metadata += [each for part in metadata for each in getattr(part, "metadata", ())]
            kind = getattr(kind, "__origin__", kind)
            if kind in (int, float):
                found[name] = {"type": kind} | {
                    key: getattr(each, key) for each in metadata for key in ("gt", "ge", "lt", "le") if hasattr(each, key)
                }
    return found


def refused(script: str, name: str, value) -> bool:
    """Whether Args refuses the value by that argument's own range, in one sentence; a shape may be refused for others."""
    module = load(script)
    try:
        module.Args(**{name: value})
    except module.BadInput as error:
        return bool(re.match(rf"{flag(name)} is {re.escape(repr(value))}: \S.*[^.]$", str(error)))
    return False


def test_every_number_is_refused_just_outside_its_range_and_not_inside(script):
    fields = bounds(script)
    assert {"seed", "gamma", "learning_rate", "num_envs"} <= fields.keys()
    for name, field in fields.items():
        whole, limits = field.pop("type") is int, dict(field)
        assert limits.keys() & {"gt", "ge"}, f"{name} has no lower bound"
        for key, limit in limits.items():
            away = math.inf if key in ("lt", "le") else -math.inf
            step = (lambda x, to: x + (1 if to > 0 else -1)) if whole else math.nextafter
            outside, inside = (limit, step(limit, -away)) if key in ("gt", "lt") else (step(limit, away), limit)
            assert refused(script, name, outside), (name, outside)
            assert not refused(script, name, inside), (name, inside)
        if not whole:
            assert refused(script, name, math.nan), name
            assert refused(script, name, -math.inf), name
            assert refused(script, name, math.inf) == (name != "max_grad_norm"), name


def test_help_shows_every_argument_in_80_columns(command_line, script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = command_line(script, "--help")
    assert status in (0, None) and err == ""
    assert max(map(len, out.partition("--exp-name")[2].splitlines())) <= 80
    for name, field in load(script).Args.model_fields.items():
        assert re.search(rf"{flag(name)}\b", out), name
        if name in bounds(script):
            assert re.search(rf"{flag(name)}[^-]*?(INT|FLOAT|\d\.\.)", out), f"{name} shows no range"


@pytest.mark.full
def test_help_takes_less_than_two_seconds():
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, REPO / ONE, "--help"], check=True, capture_output=True, env=environment())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime)
    assert min(times) < 2


@pytest.mark.parametrize(
    "words",
    [["--num-envs", "many"], ["--total-timesteps", "1e6"], ["--gama", "0.9"], ["--env-backend", "jax"], ["--seed"], ["--resume"]],
)
def test_words_that_cannot_be_parsed_are_named(command_line, tmp_path, words):
    status, _, err = command_line(ONE, "--run-dir", tmp_path / "runs", *words)
    assert status == 2 and words[0] in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["batch_size", "num_envs"])
def test_env_kwargs_cannot_hold_what_the_script_sets(command_line, tmp_path, key):
    """With fewer rows a step than environments, EnvPool would never return."""
    changes = {"env_id": "Hopper-v4", "env_backend": "envpool", "env_kwargs": json.dumps({key: 1})}
    status, _, err = command_line(ONE, *command(ONE, run_dir=tmp_path / "runs", **changes))
    assert_one_sentence(status, err, repr(key))


@pytest.mark.parametrize(
    "script, changes, fragments",
    [
        (ONE, {"gamma": 1.5}, ["--gamma is 1.5", "less than or equal to 1"]),
        (ONE, {"learning_rate": "inf"}, ["--learning-rate is inf", "finite"]),
        (ONE, {"critic_width": -1}, ["--critic-width is -1", "0"]),
        (ONE, {"critic_width": 65536}, ["--critic-width is 65536", "8192"]),
        (ONE, {"num_steps": 10**12}, ["--num-envs x --num-steps is 2000000000000", "10,000,000"]),
        (ONE, {"num_minibatches": 3}, ["--num-minibatches 3", "64"]),
        (ONE, {"total_timesteps": 63}, ["--total-timesteps 63", "64"]),
        ("blpo_continuous.py", {"num_steps": 10**6, "critic_width": 8192, "total_timesteps": 10**8}, ["--critic-width", "2,000,000,000"]),
        ("blpo_continuous.py", {"critic_width": 0, "num_steps": 10**6, "nystrom_rank": 8192, "total_timesteps": 10**7}, ["2,000,000,000"]),
        ("blpo_continuous.py", {"critic_width": 8192, "nystrom_rank": 4096}, ["--nystrom-rank", "2,000,000,000"]),
        (ONE, {"env_kwargs": '{"a": 3'}, ["--env-kwargs is", "Expecting"]),
        (ONE, {"env_kwargs": "[3]"}, ["--env-kwargs is '[3]'", "JSON object"]),
        (LAB, {"nest": "minibatch", "chunk_length": 24}, ["--chunk-length 24", "--num-steps 32"]),
        (LAB, {"nest": "minibatch", "num_envs": 2, "num_steps": 32, "chunk_length": 16, "num_minibatches": 8}, ["--num-minibatches 8", "4 chunks"]),
        (LAB, {"ihvp": "exact", "curvature": "hessian"}, ["--ihvp exact", "--ihvp cg"]),
        (LAB, {"ihvp": "exact", "num_steps": 16384, "total_timesteps": 10**6}, ["--ihvp exact", "20,000"]),
        (LAB, {"direct_advantages": "rollout"}, ["--direct-advantages rollout", "--ihvp none"]),
        (LAB, {"chunk_length": 16}, ["--chunk-length 16", "--nest minibatch"]),
        (LAB, {"ihvp": "none", "correction_control": "permuted"}, ["--correction-control permuted", "--ihvp none"]),
        (LAB, {"ihvp_bound": 0.5}, ["--ihvp-bound", "--leader released"]),
        (LAB, {"leader": "released"}, ["--leader released", "--nest minibatch"]),
        (LAB, {"leader": "released", "nest": "minibatch", "chunk_length": 8}, ["--leader released", "--no-norm-adv"]),
    ],
)
def test_what_cannot_be_is_one_sentence_on_the_command_line_and_in_python(command_line, tmp_path, script, changes, fragments):
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", **changes))
    assert_one_sentence(status, err, *fragments)
    assert not (tmp_path / "runs").exists()
    module = load(script)
    with pytest.raises(module.BadInput):
        module.Args(**changes)


@pytest.mark.parametrize("script", ["blpo_continuous.py", "blpo_discrete.py", LAB])
def test_the_rank_counts_towards_memory_only_where_there_is_one(script):
    module, wide = load(script), {"critic_width": 1024, "num_steps": 65536, "total_timesteps": 10**6}
    assert module.Args(**wide, ihvp="cg").critic_width == 1024
    with pytest.raises(module.BadInput, match="nystrom-rank"):
        module.Args(**wide)


@pytest.mark.parametrize("script", BLPO_SCRIPTS)
def test_a_rank_above_the_number_of_features_is_allowed(script, tmp_path):
    assert train(script, run_dir=tmp_path, nystrom_rank=8192, total_timesteps=64).is_dir()


# ---- Tasks -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "env_id, fragment",
    [("Hoper-v4", "Hopper"), ("Hopper-v99", "v5"), ("nowhere/Hopper-v4", "Namespace nowhere"), ("", "Malformed"),
     ("no_such_module:Hopper-v4", "No module named 'no_such_module'"), (":Hopper-v4", "Empty module name"), ("Hopper v4", "Malformed"),
     ("toy_envs:toy/Unavailable-v0", "ImportError: needs the package maps"), ("Pusher-v4", "mujoco")],
)  # fmt: skip
def test_a_task_that_cannot_be_made_is_one_line_with_its_own_error(command_line, tmp_path, env_id, fragment):
    words = command(ONE, run_dir=tmp_path / "runs", env_id=env_id, eval_episodes=1)  # EnvPool alone has Pusher-v4
    status, _, err = command_line(ONE, *words)
    assert_one_line(status, err, f"--env-id {env_id!r} cannot be made: ", fragment)
    assert "ppo_continuous.py" not in err
    assert "frozen" not in err and not (tmp_path / "runs").exists()


TASK = """import gymnasium as gym
from toy_envs import Clock
class Mine(Clock):
    def __init__(self, slope=1.0):
        self.slope = slope
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)
    def step(self, action):
        return super().step(action)
gym.register("Mine-v0", entry_point=Mine)
"""


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    """Write the user's own task, changed, into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))

    def write(old: str = "", new: str = "") -> str:
        assert old in TASK
        sys.modules.pop("mine", None)
        importlib.invalidate_caches()
        (tmp_path / "mine.py").write_text(TASK.replace(old, new, 1) if old else TASK)
        return "mine:Mine-v0"

    yield write
    sys.modules.pop("mine", None)
    gym.registry.pop("Mine-v0", None)


@pytest.mark.parametrize("raised, shown", [("ValueError('it is wrong')", "ValueError: it is wrong"), ("SystemExit('bye')", "SystemExit: bye")])
@pytest.mark.parametrize("old, line", [("import gymnasium as gym", 1), ("self.slope = slope", 5), ("return super().reset(seed=seed)", 7),
                                       ("return super().step(action)", 9)])  # fmt: skip
def test_a_task_of_ones_own_that_raises_before_the_training_is_one_line_that_says_where(
    command_line, own_task, tmp_path, old, line, raised, shown
):
    status, _, err = command_line(ONE, *command(ONE, run_dir="runs", env_id=own_task(old, f"raise {raised}")))
    assert_one_line(status, err, "--env-id 'mine:Mine-v0' cannot be made", shown, f"{tmp_path / 'mine.py'}, line {line}")
    assert not (tmp_path / "runs").exists()


def test_a_task_of_ones_own_that_is_no_python_is_one_line(command_line, own_task, tmp_path):
    status, _, err = command_line(ONE, *command(ONE, run_dir="runs", env_id=own_task("class Mine(Clock):", "class Mine(Clock")))
    assert_one_line(status, err, "SyntaxError", "mine.py", "line 3")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("raised, expected", [("ValueError('it is wrong')", ValueError), ("SystemExit(0)", RuntimeError)])
def test_a_task_that_raises_in_a_step_of_the_training_fails_the_run(own_task, tmp_path, raised, expected):
    """The traceback goes through the user's file; Python prints it and ends with status 1."""
    sys.path.append(str(tmp_path))
    late = f"Clock.steps = getattr(Clock, 'steps', 0) + 1\n        if Clock.steps > 150: raise {raised}\n        return super().step(action)"
    with pytest.raises(expected) as failure:
        train(ONE, run_dir="runs", env_id=own_task("return super().step(action)", late))
    cause = failure.value.__cause__ or failure.value
    frames = []
    trace = cause.__traceback__
    while trace:
        frames.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    assert str(tmp_path / "mine.py") in frames
    (folder,) = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "failed" and result["error"].startswith(raised.split("(")[0])
    sys.modules["toy_envs"].Clock.steps = 0


@pytest.mark.parametrize("kwargs, status", [('{"slope": 2.0}', 0), ('{"slop": 2.0}', 2)])
def test_the_keywords_of_a_task_reach_it_in_gymnasium(command_line, own_task, tmp_path, kwargs, status):
    words = command(ONE, run_dir="runs", env_id=own_task(), env_kwargs=kwargs, total_timesteps=64, eval_episodes=1)
    found, _, err = command_line(ONE, *words)
    if status:
        assert_one_line(found, err, "unexpected keyword argument 'slop'")
    assert found == status and (tmp_path / "runs").exists() == (status == 0)


@pytest.mark.parametrize("kwargs, status", [('{"terminate_when_unhealthy": false}', 0), ('{"terminate_when": false}', 2)])
def test_the_keywords_of_a_task_reach_it_in_envpool(command_line, tmp_path, kwargs, status):
    words = command(ONE, run_dir=tmp_path / "runs", env_id="Hopper-v4", env_backend="envpool", env_kwargs=kwargs, total_timesteps=640)
    found, _, err = command_line(ONE, *words)
    if status:
        assert_one_line(found, err, "unexpected keyword argument 'terminate_when'")
        assert not (tmp_path / "runs").exists()
    else:
        assert found == 0 and len(next((tmp_path / "runs").glob("*/episodes.csv")).read_text().splitlines()) == 1  # none ended


OTHER_ACTIONS = {  # a script, and the one for the actions that it cannot use
    "ppo_continuous.py": "ppo_discrete.py", "blpo_continuous.py": "blpo_discrete.py",
    "blpo_continuous_ablations.py": "blpo_discrete.py",
    "ppo_discrete.py": "ppo_continuous.py", "blpo_discrete.py": "blpo_continuous.py",
}  # fmt: skip


def test_the_other_kind_of_actions_names_the_other_script(command_line, script, tmp_path):
    env_id, other = "Hopper-v4" if script in DISCRETE_SCRIPTS else "CartPole-v1", OTHER_ACTIONS[script]
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", env_id=env_id))
    assert_one_sentence(status, err, f"--env-id {env_id!r}", f"use {other}")
    assert (REPO / other).exists() and not (tmp_path / "runs").exists()


NAN, WIDE = "gym.spaces.Box(float('nan'), 1, (2,))", "gym.spaces.Box(-3e38, 3e38, (1,))"


@pytest.mark.parametrize("script", ["ppo_continuous.py", "ppo_discrete.py"])
@pytest.mark.parametrize("env_id", ["toy/MultiDiscreteActions-v0", "toy/MatrixActions-v0", "toy/SequenceObs-v0"])
def test_spaces_that_a_script_cannot_use_are_named(command_line, script, tmp_path, env_id):
    env_id = f"toy_envs:{for_actions(script, env_id) if 'Obs' in env_id else env_id}"
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", env_id=env_id))
    assert_one_sentence(status, err, f"--env-id {env_id!r} has the", "this script needs a")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "old, new",
    [("def __init__", f"action_space = {NAN}\n    def __init__"), ("def __init__", f"observation_space = {NAN}\n    def __init__"),
     ("def __init__", "action_space = gym.spaces.Box(-1, 1, (0,))\n    def __init__"),
     ("def __init__", "action_space = gym.spaces.Box(1, 1, (1,))\n    def __init__"),
     ("def __init__", "action_space = gym.spaces.Box(0, 5, (1,), 'int32')\n    def __init__"),
     ("return super().step(action)", "import numpy as np; o, r, *rest = super().step(action); return o, np.array([r]), *rest")],
)  # fmt: skip
def test_odd_spaces_and_rewards_of_a_task_are_one_line(command_line, own_task, tmp_path, old, new):
    status, _, err = command_line(ONE, *command(ONE, run_dir="runs", env_id=own_task(old, new)))
    assert_one_line(status, "".join(line for line in err.splitlines(True) if not line.startswith("note: ")), "--env-id 'mine:Mine-v0'")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("space", ["gym.spaces.Box(-float('inf'), float('inf'), (1,))", WIDE])
def test_actions_without_bounds_are_trained_and_played(own_task, tmp_path, space):
    sys.path.append(str(tmp_path))
    env_id = own_task("def __init__", f"action_space = {space}\n    def __init__")
    folder = train(ONE, run_dir="runs", env_id=env_id, eval_episodes=1)
    assert np.isfinite(json.loads((folder / "result.json").read_text())["eval_returns"]).all()


@pytest.mark.parametrize("env_id, size", [("toy/DictObs-v0", 4 + 3), ("toy/DiscreteObs-v0", 4)])
def test_observations_that_can_be_flattened_are(tmp_path, toy_envs, env_id, size):
    folder = train(ONE, run_dir=tmp_path, env_id=env_id, save_model=True, total_timesteps=64, eval_episodes=1)
    assert len(torch.load(folder / "model.pt", weights_only=True)["agent"]["obs_mean"]) == size


# ---- This machine ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("missing", [None, "envpool", "wandb"])
def test_what_is_not_installed_or_does_not_have_the_task_is_named(command_line, tmp_path, monkeypatch, missing):
    changes = {None: {"env_backend": "envpool"}, "envpool": {"env_backend": "envpool", "env_id": "Hopper-v4"}, "wandb": {"track": True}}
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    status, _, err = command_line(ONE, *command(ONE, run_dir=tmp_path / "runs", **changes[missing]))
    assert_one_sentence(status, err, "--track" if missing == "wandb" else "--env-backend envpool", missing or "use sync or async")
    assert not [*tmp_path.glob("runs/*")]


def test_without_envpool_gymnasium_serves(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    assert train(ONE, run_dir=tmp_path, env_id="Pendulum-v1", total_timesteps=64).is_dir()


def test_cuda_where_there_is_none(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = command_line(ONE, *command(ONE, run_dir=tmp_path / "runs", device="cuda"))
    assert_one_sentence(status, err, "--device cuda", "--device cpu")
    assert not (tmp_path / "runs").exists()


def test_a_run_dir_below_a_file(command_line, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, _, err = command_line(ONE, *command(ONE, run_dir=tmp_path / "file" / "runs"))
    assert_one_sentence(status, err, "--run-dir", str(tmp_path / "file" / "runs"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_dir_that_is_a_link_to_nowhere(command_line, tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted")
    status, _, err = command_line(ONE, *command(ONE, run_dir=tmp_path / "runs"))
    assert_one_sentence(status, err, "--run-dir", str(tmp_path / "runs"))


def test_a_film_of_a_task_that_cannot_be_drawn_costs_the_film_alone(command_line, tmp_path):
    words = command(ONE, run_dir=tmp_path, capture_video=True, eval_episodes=1)  # the toy task has no picture
    status, _, err = command_line(ONE, *words)
    assert status == 0 and len(re.findall("no film, the run is complete: .*MUJOCO_GL.*", err)) == 1
    result = json.loads(next(tmp_path.glob("*/result.json")).read_text())
    assert result["status"] == "finished" and len(result["eval_returns"]) == 1


# ---- --resume --------------------------------------------------------------------------------------------------
def snapshot(folder) -> dict:
    """The files below a folder and their contents."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(broken_off, tmp_path):
    """A copy of a run that can be resumed."""
    return shutil.copytree(broken_off, tmp_path / "run")


def not_resumed(command_line, script, folder, *words) -> str:
    """The one line that says why --resume is refused; the folder stays as it is, to the byte."""
    before = snapshot(folder)
    status, _, err = command_line(script, "--resume", folder, *words)
    (line,) = [line for line in err.splitlines() if not re.search(" was .* and is now ", line)]
    assert status == 2 and line.startswith("error: "), err
    assert snapshot(folder) == before
    return line


@pytest.mark.parametrize("script", [ONE], indirect=True)
@pytest.mark.parametrize("content", ["", "{}", "[]", '{"script": "ppo_continuous.py", "args": 3}', '{"args": {"gama": 1}}'])
def test_a_folder_with_damaged_arguments_is_not_resumed(command_line, script, run, content):
    (run / "args.json").write_text(content)
    assert f"--resume {run} is not a run folder" in not_resumed(command_line, script, run)


@pytest.mark.parametrize("script", [ONE], indirect=True)
def test_a_folder_that_is_no_run_is_not_touched(command_line, script, tmp_path):
    (tmp_path / "other").mkdir()
    for name in ("none", "other"):
        assert f"--resume {tmp_path / name} is not a run folder" in not_resumed(command_line, script, tmp_path / name)
        module = load(script)
        with pytest.raises(module.BadInput, match="has no checkpoint"):
            module.train(module.Args(resume=tmp_path / name))
    assert not (tmp_path / "none").exists() and [*(tmp_path / "other").iterdir()] == []


@pytest.mark.parametrize("script", [ONE], indirect=True)
def test_a_run_of_another_script_is_not_resumed(command_line, script, run):
    for other in ("ppo_discrete.py", "blpo_continuous.py"):
        assert "is not a run folder of this script: it was made by ppo_continuous.py" in not_resumed(command_line, other, run)


@pytest.mark.parametrize("script", [ONE], indirect=True)
@pytest.mark.parametrize("damage", ["gone", "empty", "truncated", "text", "something else"])
def test_a_checkpoint_that_cannot_be_used_is_one_line(command_line, script, run, damage):
    path = run / "checkpoint.pt"
    content = path.read_bytes()
    if damage == "something else":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "text": b"mine\n"}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    assert "checkpoint.pt" in not_resumed(command_line, script, run)


@pytest.mark.parametrize("script", ["blpo_continuous.py"], indirect=True)
@pytest.mark.parametrize(
    "words, fragment",
    [(["--critic-width", "9"], "another shape"), (["--env-id", "Hopper-v4"], "another shape"), (["--env-id", "Hoper-v4"], "Hopper"),
     (["--env-id", "CartPole-v1"], "blpo_discrete.py"), (["--gamma", "2"], "--gamma is 2"), (["--total-timesteps", "192"], "256 steps"),
     (["--num-envs", "3", "--total-timesteps", "960"], "256 steps"), (["--device", "cuda"], "--device cpu")],
)  # fmt: skip
def test_a_resume_that_cannot_be_changes_nothing(command_line, script, run, monkeypatch, words, fragment):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fragment in not_resumed(command_line, script, run, *words)


@pytest.mark.parametrize("script", [ONE], indirect=True)
def test_a_run_that_is_still_alive_is_not_resumed(command_line, script, run):
    """The lock comes before the checkpoint is read."""
    with filelock.FileLock(run / ".lock"):
        assert "still running in another process" in not_resumed(command_line, script, run)
    status, _, err = command_line(script, "--resume", run)
    assert status == 0, err


@pytest.mark.parametrize("script", [ONE], indirect=True)
def test_wandb_that_refuses_changes_nothing(command_line, script, run, tmp_path, monkeypatch):
    class Refuses:
        def init(**settings):
            raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", Refuses)
    assert "api_key not configured" in not_resumed(command_line, script, run, "--track")
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", track=True))
    assert_one_sentence(status, err, "--track", "api_key not configured")
    assert [*tmp_path.glob("runs/*")] == []


# ---- The same from a shell -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "script",
    ["blpo_continuous.py", *(pytest.param(name, marks=pytest.mark.full) for name in SCRIPTS if name != "blpo_continuous.py")],
)
def test_a_copied_script_runs_alone_in_an_empty_folder(tmp_path, script):
    (tmp_path / "cwd").mkdir()
    shutil.copy(REPO / script, tmp_path)
    env_id = "InvertedPendulum-v4" if script in CONTINUOUS_SCRIPTS else "CartPole-v1"
    words = command(script, env_id=env_id, run_dir=None, eval_episodes=1)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, tmp_path / script, *words], cwd=tmp_path / "cwd", env=env, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "", done.stderr
    (folder,) = (tmp_path / "cwd" / "runs").iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    bad = subprocess.run([sys.executable, tmp_path / script, "--gamma", "nan"], cwd=tmp_path / "cwd", env=env, capture_output=True, text=True)
    assert_one_sentence(bad.returncode, bad.stderr, "--gamma is nan")
