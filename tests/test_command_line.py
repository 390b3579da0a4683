"""Every mistake on the command line ends with status 2 and one sentence that names it, and leaves nothing behind."""

import ast
import dataclasses
import functools
import inspect
import json
import math
import re
import shutil
import signal
import sys

import gymnasium as gym
import pytest
import torch
from conftest import (
    BLPO_SCRIPTS, DISCRETE_SCRIPTS, ITERATIONS, REPO, SCRIPTS, TINY, WALK, command, for_actions, load, resume, run_script,
    train,
)  # fmt: skip

INTERVAL = re.compile(r"in (?P<left>[\[(])(?P<low>\S+), (?P<high>\S+?)(?P<right>[\])])")


def numbers(script: str) -> dict[str, tuple[str, re.Match | None]]:
    """The int and float fields of Args: name -> (annotation, the interval that the line below states)."""
    tree = ast.parse((REPO / script).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    found = {}
    for field, line in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign) and re.search(r"\b(int|float)\b", ast.unparse(field.annotation)):
            found[field.target.id] = (ast.unparse(field.annotation), INTERVAL.search(line.value.value))
    return found


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def ends(annotation: str, interval: re.Match) -> tuple[list[float], list[float]]:
    """The values just outside and just inside of the ends of the interval; nothing is outside of "inf]"."""
    whole = "int" in annotation
    outside, inside = [], []
    for end, closed, away in (
        (float(interval["low"]), interval["left"] == "[", -math.inf),
        (float(interval["high"]), interval["right"] == "]", math.inf),
    ):
        if whole and math.isfinite(end):
            beyond, at = int(end) + (1 if away > 0 else -1), int(end)
        else:
            beyond, at = math.nextafter(end, away), end
        if closed:
            inside.append(at)
            outside += [beyond] if math.isfinite(end) else []
        else:
            outside.append(at)
            inside += [math.nextafter(end, -away)] if math.isfinite(end) else []
    return outside, inside


def assert_one_sentence(status: int, err: str, *fragments: str) -> None:
    """Status 2 and one line "error: ..." of one sentence, with these fragments."""
    assert status == 2, err
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), f"not one sentence:\n{err}"
    assert not re.search(r"[.?!]['\"]?[;,]? +\S", lines[0].replace("...", "")), f"more than one sentence: {lines[0]}"
    for fragment in fragments:
        assert fragment in lines[0], f"{fragment!r} is not in: {lines[0]}"


def snapshot(folder) -> dict:
    """The files below a folder and their contents."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- Numbers ---------------------------------------------------------------------------------------------------
def test_every_number_states_its_interval(script):
    fields = numbers(script)
    assert {"seed", "gamma", "learning_rate", "num_envs"} <= fields.keys()
    assert [name for name, (_, interval) in fields.items() if interval is None] == []
    declared = {field.name for field in dataclasses.fields(load(script).Args) if re.search("int|float", str(field.type))}
    assert fields.keys() == declared  # no number is without a line of its own


def test_every_number_is_refused_just_outside_its_interval(script, monkeypatch):
    module = load(script)
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))  # it parses the file each time
    for name, (annotation, interval) in numbers(script).items():
        outside, inside = ends(annotation, interval)
        assert outside, name
        for value in [*outside, math.nan]:
            with pytest.raises(module.BadInput) as refusal:
                module.check_ranges(dataclasses.replace(module.Args(), **{name: value}))
            assert str(refusal.value).startswith(f"{flag(name)} is {value}, it must be in {interval[0][3:]}")
        for value in inside:
            module.check_ranges(dataclasses.replace(module.Args(), **{name: value}))


def test_the_defaults_are_inside_their_intervals(script):
    module = load(script)
    module.check_ranges(module.Args())


@pytest.mark.parametrize(
    "name, value",
    [("seed", -1), ("seed", 2**31), ("gamma", 1.5), ("gamma", "nan"), ("learning_rate", 0), ("learning_rate", "inf"),
     ("num_steps", 1), ("num_envs", 0), ("eval_episodes", 10001), ("clip_coef", -0.2)],
)  # fmt: skip
def test_number_out_of_range(command_line, script, tmp_path, name, value):
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", **{name: value}))
    assert_one_sentence(status, err, f"{flag(name)} is {float(value) if 'float' in numbers(script)[name][0] else value}")
    assert not (tmp_path / "runs").exists()


# ---- Words that cannot be parsed -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, named",
    [(["--num-envs", "many"], "--num-envs"), (["--total-timesteps", "1e6"], "--total-timesteps"),
     (["--gama", "0.9"], "--gama"), (["--env-backend", "jax"], "--env-backend"), (["--seed"], "--seed")],
)  # fmt: skip
def test_words_that_cannot_be_parsed(command_line, script, tmp_path, words, named):
    status, _, err = command_line(script, "--run-dir", tmp_path / "runs", *words)
    assert status == 2
    assert named in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_help_shows_every_argument_and_its_line(command_line, script):
    status, out, err = command_line(script, "--help")
    assert status in (0, None) and err == ""
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    for field in dataclasses.fields(load(script).Args):
        assert re.search(rf"{flag(field.name)}\b", words), field.name
    for name, (_, interval) in numbers(script).items():
        assert interval[0] in words, f"{name}: {interval[0]}"


# ---- Environments ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "env_id, nearest",
    [("Hoper-v4", "Hopper-v4"), ("Hopper-v99", "Hopper-v5"), ("HalfChetah-v4", "HalfCheetah-v4"),
     ("nowhere/Hopper-v4", "Hopper-v5"), ("no_such_module:Hopper-v4", "PYTHONPATH"),
     ("", "--env-id"), (":Hopper-v4", "--env-id"), ("Hopper v4", "Hopper-v4")],
)  # fmt: skip
def test_unknown_environment(command_line, script, tmp_path, env_id, nearest):
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", env_id=env_id))
    assert_one_sentence(status, err, "--env-id", repr(env_id), nearest)
    assert not (tmp_path / "runs").exists()


def test_nearest_names_are_named_once(command_line, script, tmp_path):
    """EnvPool and Gymnasium share many names."""
    _, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", env_id="Walker2-v4"))
    names = re.findall(r"Walker2d-v\d", err)
    assert names and len(names) == len(set(names)), err


def test_environment_that_is_registered_but_cannot_be_made(command_line, script, toy_envs, tmp_path):
    """The sentence says why, and does not offer the same name again."""
    words = command(script, run_dir=tmp_path / "runs", env_id="toy/Unavailable-v0")
    status, _, err = command_line(script, *words)
    assert_one_sentence(status, err, "--env-id 'toy/Unavailable-v0'", "needs the package maps")
    assert err.count("toy/Unavailable-v0") == 1
    assert not (tmp_path / "runs").exists()


OTHER_ACTIONS = {  # a script, and the one for the actions that it cannot use
    "ppo_continuous.py": "ppo_discrete.py", "blpo_continuous.py": "blpo_discrete.py",
    "blpo_continuous_ablations.py": "blpo_discrete.py",
    "ppo_discrete.py": "ppo_continuous.py", "blpo_discrete.py": "blpo_continuous.py",
}  # fmt: skip


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_the_other_kind_of_actions_names_the_other_script(command_line, script, tmp_path, backend):
    tasks = {"envpool": ("CartPole-v1", "Hopper-v4"), "gymnasium": ("toy_envs:toy/DiscreteActions-v0", WALK)}
    env_id, other = tasks[backend][script in DISCRETE_SCRIPTS], OTHER_ACTIONS[script]
    words = command(script, run_dir=tmp_path / "runs", env_id=env_id, env_backend=backend)
    status, _, err = command_line(script, *words)
    assert_one_sentence(status, err, "--env-id", repr(env_id), f"use {other}")
    assert (REPO / other).exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("env_id", ["toy/MultiDiscreteActions-v0", "toy/MatrixActions-v0", "toy/SequenceObs-v0"])
def test_spaces_the_script_cannot_use(command_line, script, tmp_path, env_id):
    observations = "Obs" in env_id
    env_id = for_actions(script, env_id) if observations else env_id
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", env_id=f"toy_envs:{env_id}"))
    needed = "a Discrete one" if script in DISCRETE_SCRIPTS and not observations else "a flat Box"
    assert_one_sentence(status, err, "--env-id", env_id, f"this script needs {needed}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("env_id, size", [("toy/DictObs-v0", 4 + 3), ("toy/DiscreteObs-v0", 4)])
def test_observations_that_can_be_flattened_are(command_line, script, tmp_path, env_id, size):
    env_id = f"toy_envs:{for_actions(script, env_id)}"
    words = command(script, run_dir=tmp_path, env_id=env_id, save_model=True, total_timesteps=64)
    status, _, err = command_line(script, *words)
    assert status == 0, err
    (folder,) = tmp_path.iterdir()
    assert len(torch.load(folder / "model.pt", weights_only=True)["obs_mean"]) == size


def test_envpool_without_the_task(command_line, script, tmp_path):
    words = command(script, run_dir=tmp_path / "runs", env_backend="envpool")
    status, _, err = command_line(script, *words)
    assert_one_sentence(status, err, "--env-backend envpool", for_actions(script, WALK), "gymnasium")
    assert not (tmp_path / "runs").exists()


def test_envpool_not_installed(command_line, script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    words = command(script, run_dir=tmp_path / "runs", env_backend="envpool", env_id="Hopper-v4")
    status, _, err = command_line(script, *words)
    assert_one_sentence(status, err, "--env-backend envpool", "not installed", "gymnasium")
    assert not (tmp_path / "runs").exists()


# ---- Shapes ----------------------------------------------------------------------------------------------------
def numbers_that_would_do(err: str) -> list[int]:
    """The numbers of "...; 2 or 4 would"."""
    return [int(word) for word in re.search(r"((?:\d+ or )?\d+) would\s*$", err).group(1).split(" or ")]


@pytest.mark.parametrize("num_minibatches", [3, 5, 7, 1000])
def test_minibatches_that_do_not_divide_a_rollout(command_line, script, tmp_path, num_minibatches):
    words = command(script, run_dir=tmp_path / "runs", num_minibatches=num_minibatches)
    status, _, err = command_line(script, *words)
    assert_one_sentence(status, err, f"--num-minibatches {num_minibatches}")
    assert not (tmp_path / "runs").exists()
    for better in numbers_that_would_do(err):
        load(script).check_batch_shape(
            load(script).parse_args(load(script).Args, command(script, num_minibatches=better))
        )


@pytest.mark.parametrize("script", BLPO_SCRIPTS)
@pytest.mark.parametrize("chunk_length", [3, 24, 64])
def test_chunks_that_do_not_divide_a_rollout(command_line, script, tmp_path, chunk_length):
    words = command(script, run_dir=tmp_path / "runs", chunk_length=chunk_length, num_minibatches=1)
    status, _, err = command_line(script, *words)
    assert_one_sentence(status, err, f"--chunk-length {chunk_length}")
    assert not (tmp_path / "runs").exists()
    assert all(TINY["num_steps"] % better == 0 for better in numbers_that_would_do(err))


def test_a_rollout_far_too_long_is_refused_at_once(command_line, script, tmp_path):
    """To look for divisors one by one would take hours."""

    def too_slow(number, frame):
        raise TimeoutError("the refusal of a shape took more than 10 seconds")

    handler = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(10)
    try:
        words = command(script, run_dir=tmp_path / "runs", num_steps=2**31 + 2, num_minibatches=7)
        status, _, err = command_line(script, *words)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert_one_sentence(status, err)
    assert not (tmp_path / "runs").exists()


def test_a_task_whose_constructor_fails(command_line, script, toy_envs, tmp_path):
    gym.register("toy/Needy-v0", entry_point=toy_envs.Spaces)  # without the spaces that it must be given
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", env_id="toy/Needy-v0"))
    gym.registry.pop("toy/Needy-v0")
    assert_one_sentence(status, err, "--env-id 'toy/Needy-v0'", "missing 2 required positional arguments")
    assert not (tmp_path / "runs").exists()


def test_total_timesteps_below_one_rollout(command_line, script, tmp_path):
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", total_timesteps=63))
    assert_one_sentence(status, err, "--total-timesteps 63", "at least 64")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", BLPO_SCRIPTS)
def test_nystrom_rank_above_the_size_of_the_critic(command_line, script, tmp_path):
    size = (3 + 1) * 8 + (8 + 1) * 8 + (8 + 1)  # Walk has 3 observations, the critic two layers of 8
    words = command(script, run_dir=tmp_path / "runs", nystrom_rank=size + 1)
    status, _, err = command_line(script, *words)
    assert_one_sentence(status, err, f"--nystrom-rank {size + 1}", f"{size} parameters")
    assert not (tmp_path / "runs").exists()
    for ihvp in ("none", "exact"):  # which have no use for a rank
        assert train(script, run_dir=tmp_path / "runs", nystrom_rank=size + 1, ihvp=ihvp).is_dir()


def test_the_released_leader_has_no_normalised_advantages(command_line, tmp_path):
    words = command("blpo_continuous_ablations.py", run_dir=tmp_path / "runs", leader="released")
    status, _, err = command_line("blpo_continuous_ablations.py", *words)
    assert_one_sentence(status, err, "--leader released", "add --no-norm-adv")
    assert not (tmp_path / "runs").exists()
    assert train("blpo_continuous_ablations.py", run_dir=tmp_path / "runs", leader="released", norm_adv=False).is_dir()


# ---- This machine ----------------------------------------------------------------------------------------------
def test_cuda_where_there_is_none(command_line, script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", device="cuda"))
    assert_one_sentence(status, err, "--device cuda", "cpu")
    assert not (tmp_path / "runs").exists()


def test_track_without_wandb(command_line, script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", track=True))
    assert_one_sentence(status, err, "--track", "wandb")
    assert not (tmp_path / "runs").exists()


def test_run_dir_below_a_regular_file(command_line, script, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "file" / "runs"))
    assert_one_sentence(status, err, "--run-dir", str(tmp_path / "file" / "runs"))
    assert snapshot(tmp_path) == {tmp_path / "file": b"mine"}


# ---- --resume --------------------------------------------------------------------------------------------------
@pytest.fixture
def copy(broken_off, tmp_path):
    """A copy of a run that can be resumed."""
    return shutil.copytree(broken_off, tmp_path / "copy")


def refused(command_line, script, folder, *words) -> str:
    """What --resume says when it refuses; the folder stays as it is, to the byte."""
    before = snapshot(folder)
    status, _, err = command_line(script, "--resume", folder, *words)
    assert_one_sentence(status, err)
    assert snapshot(folder) == before
    return err


def test_resume_of_a_missing_folder(command_line, script, tmp_path):
    assert f"--resume {tmp_path / 'none'}" in refused(command_line, script, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", ["", '{"args": {"seed"', "{}", "[]", '{"script": "SCRIPT", "args": 3}'])
def test_resume_of_a_folder_with_damaged_arguments(command_line, script, copy, content):
    (copy / "args.json").write_text(content.replace("SCRIPT", script))
    assert "--resume" in refused(command_line, script, copy)


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_resume_of_a_folder_with_a_damaged_result(command_line, script, copy, content):
    (copy / "result.json").write_text(content)
    assert "--resume" in refused(command_line, script, copy)


def test_resume_of_another_script(command_line, script, copy):
    other = next(name for name in SCRIPTS if name != script)
    err = refused(command_line, other, copy)
    assert f"--resume {copy}" in err and script in err and other in err


def test_resume_of_the_checkpoint_of_another_script(command_line, script, copy):
    checkpoint = torch.load(copy / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"script": "sac.py"}, copy / "checkpoint.pt")
    err = refused(command_line, script, copy)
    assert "--resume" in err and "sac.py" in err


@pytest.mark.parametrize(
    "name, value, old",
    [("env_id", "Hopper-v4", WALK), ("seed", 6, 5), ("gamma", 0.5, 0.99), ("total_timesteps", 6400, ITERATIONS * 64)],
)
def test_resume_with_another_argument(command_line, script, copy, name, value, old):
    err = refused(command_line, script, copy, flag(name), str(value))
    assert f"{flag(name)} is {value}" in err and for_actions(script, str(old)) in err


def test_resume_of_a_finished_run(command_line, script, finished):
    assert "finished" in refused(command_line, script, finished.folder)


def test_resume_without_a_checkpoint(command_line, script, copy):
    (copy / "checkpoint.pt").unlink()
    assert "checkpoint.pt" in refused(command_line, script, copy)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_resume_of_a_truncated_checkpoint(command_line, script, copy, kept):
    content = (copy / "checkpoint.pt").read_bytes()
    (copy / "checkpoint.pt").write_bytes(content[: int(kept * len(content))])
    err = refused(command_line, script, copy)
    assert "checkpoint.pt is truncated or damaged" in err


def test_resume_of_a_checkpoint_that_holds_something_else(command_line, script, copy):
    torch.save({"weights": torch.zeros(3)}, copy / "checkpoint.pt")
    assert "checkpoint.pt" in refused(command_line, script, copy)


def test_resume_with_the_whole_first_command_again(script, copy):
    """What was given before may be given again, also where it is an "auto" that was resolved since."""
    words = command(script, seed=5, device="auto", env_threads=0)
    assert resume(script, copy, *words) == copy
    assert json.loads((copy / "result.json").read_text())["status"] == "finished"


def test_resume_may_change_what_leaves_the_result_as_it_is(script, copy):
    assert resume(script, copy, "--save-model", "--eval-episodes", "2", "--checkpoint-every", "1") == copy
    assert (copy / "model.pt").exists()
    assert len(json.loads((copy / "result.json").read_text())["eval_returns"]) == 2


# ---- The same from a shell -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "script, changes, fragment",
    [("ppo_continuous.py", {"gamma": "nan"}, "--gamma is nan"),
     ("blpo_continuous.py", {"env_id": "CartPole-v1"}, "blpo_discrete.py"),
     ("ppo_discrete.py", {"env_id": "Hopper-v4"}, "ppo_continuous.py"),
     ("ppo_continuous.py", {"capture_video": True}, "MUJOCO_GL=osmesa")],  # the toy task cannot be drawn
)  # fmt: skip
def test_from_a_shell(tmp_path, script, changes, fragment):
    done, folder = run_script(script, tmp_path / "runs", **changes)
    assert_one_sentence(done.returncode, done.stderr, fragment)
    assert folder is None and done.stdout == ""
