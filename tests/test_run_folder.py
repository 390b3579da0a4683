"""What a run writes is complete and true, survives signals, kills and full disks, and can be continued exactly."""

import dataclasses
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    BATCH, CONTINUOUS_SCRIPTS, DISCRETE_SCRIPTS, ITERATIONS, NUM_ENVS, REPO, after_iteration, command, for_actions, load,
    pooled, read_csv, resume, start, train, wait_for, without_time,
)  # fmt: skip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def load_checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: tag -> (step, value), all of them."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def same(a, b) -> bool:
    """Whether two checkpoints are bitwise equal, but for the wall time."""
    if isinstance(a, dict):
        names = a.keys() - {"wall_time"}
        return names == b.keys() - {"wall_time"} and all(same(a[name], b[name]) for name in names)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def assert_csv_in_order(folder: Path, iterations: int = ITERATIONS) -> None:
    """Each step once and increasing, also the wall time; episodes in order and on time."""
    metrics, episodes = read_csv(folder / "metrics.csv"), read_csv(folder / "episodes.csv")
    assert [int(row["global_step"]) for row in metrics] == [BATCH * (i + 1) for i in range(iterations)]
    times = [float(row["wall_time_s"]) for row in metrics]
    assert all(before < after for before, after in zip([0.0, *times], times))
    assert episodes, "no episode was logged"
    steps = [(int(row["global_step"]), int(row["env_index"])) for row in episodes]
    assert steps == sorted(set(steps)) and steps[-1][0] <= iterations * BATCH
    times = [float(row["wall_time_s"]) for row in episodes]
    assert times == sorted(times)


def assert_tensorboard_is_metrics_csv(folder: Path) -> None:
    """The same scalars at the same steps; an empty cell is no scalar."""
    shown = scalars(folder)
    rows = read_csv(folder / "metrics.csv")
    assert set(shown) <= rows[0].keys() - {"global_step", "wall_time_s"}
    for name in rows[0].keys() - {"global_step", "wall_time_s"}:
        expected = [(int(row["global_step"]), float(np.float32(row[name]))) for row in rows if row[name]]
        assert shown.get(name, []) == expected, name


# ---- A finished run --------------------------------------------------------------------------------------------
def test_files_of_a_finished_run(finished):
    names = {path.name for path in finished.folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert names - events == {"args.json", "episodes.csv", "metrics.csv", "checkpoint.pt", "model.pt", "result.json"}


def test_args_json(script, finished):
    saved = read_json(finished.folder / "args.json")
    resolved = {name: str(value) if isinstance(value, Path) else value for name, value in vars(finished.args).items()}
    assert saved["args"] == resolved
    assert saved["args"].keys() == {field.name for field in dataclasses.fields(load(script).Args)}
    assert saved["args"]["exp_name"] == Path(script).stem and saved["args"]["env_threads"] >= 1
    assert saved["script"] == script
    assert saved["argv"] == sys.argv
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True)
    assert saved["commit"] == (git.stdout.strip() if git.returncode == 0 else None)
    assert saved["dirty"] in (True, False) if saved["commit"] else not saved["dirty"]
    assert saved["versions"].keys() >= {"python", "torch", "numpy", "gymnasium", "envpool", "mujoco"}
    # PyPI's wheel calls itself 2.13.0 in its metadata and 2.13.0+cu130 in torch.__version__
    assert saved["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert saved["versions"]["numpy"] == np.__version__
    assert saved["cpu"] and "gpu" in saved
    assert saved["threads"] == {"torch": 1, "cores": os.cpu_count()}


def test_metrics_csv(finished):
    assert_csv_in_order(finished.folder)
    for row in read_csv(finished.folder / "metrics.csv"):
        assert row.keys() >= {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate"}
        assert row.keys() >= {"losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/old_approx_kl"}
        assert row.keys() >= {"losses/approx_kl", "losses/clipfrac", "losses/explained_variance"}
        parts = [float(row[f"time/{part}"]) for part in ("env", "policy", "update")]
        assert min(parts) > 0 and sum(parts) < float(row["wall_time_s"])
        assert all(math.isfinite(float(value)) for value in row.values() if value)


def true_episodes(finished) -> list[dict[str, str]]:
    """episodes.csv as it has to be, from the environments' own record. An episode and the reset after it take one
    step more than the episode is long."""
    instances = sorted({instance for instance, *_ in finished.steps})[:NUM_ENVS]  # the later ones evaluate
    rows, steps = [], dict.fromkeys(instances, 0)
    for instance, episodic_return, length, _ in finished.episodes:
        if instance in steps:
            step = NUM_ENVS * (steps[instance] + length)
            rows.append((step, instances.index(instance), episodic_return, length))
            steps[instance] += length + 1
    return sorted(rows)


def test_every_episode_that_ended_is_logged_with_its_return_and_length(finished):
    logged = read_csv(finished.folder / "episodes.csv")
    names = {"global_step": int, "env_index": int, "episodic_return": float, "episodic_length": int}
    found = [tuple(kind(row[name]) for name, kind in names.items()) for row in logged]
    expected = true_episodes(finished)
    assert {how for *_, how in finished.episodes} == {"terminated", "truncated"}
    assert len(found) == len(expected) > 30
    assert [row[:2] + row[3:] for row in found] == [row[:2] + row[3:] for row in expected]
    np.testing.assert_allclose([row[2] for row in found], [row[2] for row in expected], rtol=1e-12)


def test_metrics_average_the_episodes_of_the_iteration(finished):
    episodes = read_csv(finished.folder / "episodes.csv")
    for row in read_csv(finished.folder / "metrics.csv"):
        step = int(row["global_step"])
        mine = [each for each in episodes if step - BATCH < int(each["global_step"]) <= step]
        for name in ("episodic_return", "episodic_length"):
            assert float(row[f"charts/{name}"]) == pytest.approx(np.mean([float(each[name]) for each in mine]), rel=1e-12)


def test_tensorboard_shows_what_metrics_csv_holds(finished):
    assert_tensorboard_is_metrics_csv(finished.folder)


def test_an_iteration_without_an_episode_leaves_its_cells_empty(script, toy_envs, tmp_path):
    """Not 0, which would be a return; TensorBoard has no scalar there."""
    folder = train(script, run_dir=tmp_path, env_id=for_actions(script, "toy/Clock-v0"), num_steps=16)  # its episodes take 31 steps
    for name in ("charts/episodic_return", "charts/episodic_length"):
        cells = [row[name] for row in read_csv(folder / "metrics.csv")]
        assert cells[::2] == [""] * ITERATIONS and all(cells[1::2])
    assert [step for step, _ in scalars(folder)["charts/episodic_length"]] == [BATCH * (i + 1) for i in range(ITERATIONS)]


def test_result_json(finished):
    result = read_json(finished.folder / "result.json")
    last = read_csv(finished.folder / "metrics.csv")[-1]
    assert result["status"] == "finished" and "error" not in result
    assert result["global_step"] == int(last["global_step"]) == ITERATIONS * BATCH
    assert result["wall_time_s"] == float(last["wall_time_s"])
    late = [row for row in read_csv(finished.folder / "episodes.csv") if int(row["global_step"]) > 0.9 * ITERATIONS * BATCH]
    assert late and result["final_return"] == pytest.approx(np.mean([float(row["episodic_return"]) for row in late]))


def test_final_return_of_steps_that_are_no_whole_number_of_rollouts(script, toy_envs, tmp_path):
    """Training ends at 2 rollouts of the 2.9 that were asked for; its last tenth is that of the 2."""
    folder = train(script, run_dir=tmp_path, total_timesteps=int(2.9 * BATCH))
    result = read_json(folder / "result.json")
    late = [row for row in read_csv(folder / "episodes.csv") if int(row["global_step"]) > 0.9 * 2 * BATCH]
    assert result["global_step"] == 2 * BATCH
    assert late and result["final_return"] == pytest.approx(np.mean([float(row["episodic_return"]) for row in late]))


def policy_by_hand(model: dict, obs: np.ndarray) -> np.ndarray:
    """The most probable action in numpy: normalise, clip to +-10, two tanh layers; then the mean, clipped to the action
    box, or the number of the largest logit, counted from the first action's."""
    weights = {name: tensor.double().numpy() for name, tensor in model["agent"].items()}
    network = "actor_logits" if "num_actions" in model else "actor_mean"
    x = np.clip((obs.astype(np.float64) - model["obs_mean"].numpy()) / model["obs_std"].numpy(), -10, 10)
    for layer in (0, 2):
        x = np.tanh(x @ weights[f"{network}.{layer}.weight"].T + weights[f"{network}.{layer}.bias"])
    x = x @ weights[f"{network}.4.weight"].T + weights[f"{network}.4.bias"]
    if network == "actor_logits":
        return x.argmax(-1) + model["first_action"]
    return np.clip(x, model["action_low"].numpy(), model["action_high"].numpy())


def test_model_reproduces_the_actions_of_the_evaluation(script, finished):
    model = torch.load(finished.folder / "model.pt", weights_only=True)
    instances = sorted({instance for instance, *_ in finished.steps})
    steps = [(obs, action) for instance, obs, action in finished.steps if instance in instances[NUM_ENVS:]]
    observations, actions = (np.stack(arrays) for arrays in zip(*steps))
    assert len(instances) == NUM_ENVS + 3
    np.testing.assert_allclose(policy_by_hand(model, observations), actions, rtol=1e-5, atol=1e-6)
    policy = load(script).load_policy(finished.folder / "model.pt")
    np.testing.assert_allclose(policy(observations), actions, rtol=1e-5, atol=1e-6)
    assert len(np.unique(actions, axis=0)) > 1
    if script in CONTINUOUS_SCRIPTS:
        assert (actions[:, 0] == np.float32(0.1)).any()  # the clipping to the box was needed


def test_model_clips_what_it_has_never_seen(script, finished):
    """Observations far outside of the training's: the normaliser's bound of 10 counts, one row or many."""
    model = torch.load(finished.folder / "model.pt", weights_only=True)
    policy = load(script).load_policy(finished.folder / "model.pt")
    far = np.array([[1e9, 0, 0], [-1e9, 1e3, -1e3], [0, 0, 1e6]], dtype=np.float32)
    np.testing.assert_allclose(policy(far), policy_by_hand(model, far), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(policy(far[1]), policy_by_hand(model, far)[1], rtol=1e-5, atol=1e-6)


def test_model_holds_the_normaliser_of_the_training(finished):
    """The statistics of the observations that the policy answered and, as a start, of 1e-4 rows of mean 0, variance 1;
    the last two observations, which nothing answered, make the tolerance."""
    model = torch.load(finished.folder / "model.pt", weights_only=True)
    instances = sorted({instance for instance, *_ in finished.steps})[:NUM_ENVS]
    answered = np.stack([obs for instance, obs, _ in finished.steps if instance in instances]).astype(np.float64)
    count = len(answered) + 1e-4
    mean = answered.sum(0) / count
    variance = (((answered - mean) ** 2).sum(0) + 1e-4 * (1 + mean**2)) / count
    np.testing.assert_allclose(model["obs_mean"], mean, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(model["obs_std"], np.sqrt(variance + 1e-8), rtol=0.02)


def test_evaluation_returns_are_those_of_one_episode_each(finished):
    instances = sorted({instance for instance, *_ in finished.steps})[NUM_ENVS:]
    first = {}
    for instance, episodic_return, *_ in finished.episodes:
        first.setdefault(instance, episodic_return)
    expected = [first[instance] for instance in instances]
    assert read_json(finished.folder / "result.json")["eval_returns"] == pytest.approx(expected, rel=1e-6)


def test_evaluation_starts_from_other_seeds_than_the_training(finished):
    starts = first_observations(finished.steps)
    assert len(starts) == len(set(starts.values())) == NUM_ENVS + 3


def test_evaluation_does_not_change_the_training(script, finished, tmp_path):
    folder = train(script, run_dir=tmp_path, seed=3)
    assert same(load_checkpoint(folder), load_checkpoint(finished.folder))
    assert not (folder / "model.pt").exists()


def test_actions_reach_the_environment_as_its_space_has_them(script, toy_envs, finished):
    """Clipped to a box, whose ends are reached; or numbered from the first, and each of them tried."""
    actions = np.stack([action for *_, action in finished.steps])
    if script in DISCRETE_SCRIPTS:
        assert set(actions.tolist()) == {2, 3, 4}
    else:
        box = toy_envs.Walk.action_space
        assert (actions >= box.low).all() and (actions <= box.high).all()
        assert (actions[:, 0] == box.low[0]).any() and (actions[:, 0] == box.high[0]).any()


# ---- The folder's name -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id, safe", [("toy_envs:Walk-v0", "toy_envs_Walk-v0"), ("toy/Walk-v0", "toy_Walk-v0"),
                                          ("toy_envs:toy/Walk-v0", "toy_envs_toy_Walk-v0")])  # fmt: skip
def test_folder_is_named_after_the_run(script, toy_envs, tmp_path, env_id, safe):
    env_id, safe = for_actions(script, env_id), for_actions(script, safe)
    folder = train(script, run_dir=tmp_path / "a" / "b", env_id=env_id, total_timesteps=BATCH, exp_name="try", seed=7)
    assert folder.parent == tmp_path / "a" / "b" and [*folder.parent.iterdir()] == [folder]
    assert re.fullmatch(rf"{re.escape(safe)}__try__7__\d{{10}}", folder.name)


def test_runs_of_the_same_second_have_their_own_folders(script, toy_envs, tmp_path, monkeypatch):
    module = load(script)
    frozen = SimpleNamespace(time=lambda: 1.7e9, perf_counter=module.time.perf_counter)
    monkeypatch.setattr(module, "time", frozen)
    folders = [train(script, run_dir=tmp_path, total_timesteps=BATCH) for _ in range(3)]
    assert len(set(folders)) == 3 == len([*tmp_path.iterdir()])
    assert all(read_json(folder / "result.json")["status"] == "finished" for folder in folders)


def test_folders_made_at_the_same_moment_differ(script, tmp_path):
    barrier, made = threading.Barrier(8), []

    def make():
        barrier.wait()
        for _ in range(20):
            made.append(load(script).make_folder(tmp_path / "run"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == len(set(made)) == 160 and all(folder.is_dir() for folder in made)


# ---- Repeats ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
def test_the_same_command_repeats_bitwise_and_another_seed_differs(script, toy_envs, tmp_path, backend):
    changes = pooled(script) if backend == "envpool" else {}
    first, second, other = (train(script, run_dir=tmp_path, seed=seed, **changes) for seed in (5, 5, 6))
    for name in ("metrics.csv", "episodes.csv"):
        rows = without_time(read_csv(first / name))
        assert rows == without_time(read_csv(second / name)) != without_time(read_csv(other / name))
    assert same(load_checkpoint(first), load_checkpoint(second))
    assert not same(load_checkpoint(first)["agent"], load_checkpoint(other)["agent"])


def test_random_states_survive_a_checkpoint(script, tmp_path):
    module = load(script)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    random.gauss(0, 1), np.random.normal()  # both now hold a second normal number back

    def draw():
        return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.random(), torch.randn(3).tolist()]

    torch.save(module.rng_state(), tmp_path / "rng.pt")
    expected = draw()
    assert draw() != expected
    module.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected


# ---- Backends and time limits ----------------------------------------------------------------------------------
def test_both_backends_train_on_the_same_task(script, tmp_path):
    """Both log the falls of a fresh policy, which come after 4 to 40 steps; the random numbers of the two differ.
    A pole on a discrete cart, which is pushed less hard, falls in twice the time."""
    lengths = {}
    for backend in ("envpool", "gymnasium"):
        folder = train(script, run_dir=tmp_path, **pooled(script) | {"env_backend": backend})
        assert_csv_in_order(folder)
        lengths[backend] = [int(row["episodic_length"]) for row in read_csv(folder / "episodes.csv")]
        assert 4 < np.mean(lengths[backend]) / (2 if script in DISCRETE_SCRIPTS else 1) < 20
    assert lengths["envpool"] != lengths["gymnasium"]


def test_episodes_of_envpool_agree_with_a_count_by_hand(script, tmp_path, monkeypatch):
    module, records = load(script), []
    make_envs = module.make_envs

    def recorded(*arguments):
        envs, *spaces = make_envs(*arguments)
        step = envs.step

        def recorded_step(actions):
            result = step(actions)
            records.append((result[1].copy(), result[2] | result[3]))
            return result

        envs.step = recorded_step
        return envs, *spaces

    monkeypatch.setattr(module, "make_envs", recorded)
    folder = train(script, run_dir=tmp_path, **pooled(script))
    expected, rewards, fresh = [], defaultdict(list), [False] * NUM_ENVS
    for t, (reward, ended) in enumerate(records):
        for index in range(NUM_ENVS):
            if not fresh[index]:  # else this step was the reset of an episode that ended
                rewards[index].append(float(reward[index]))
            fresh[index] = bool(ended[index])
            if ended[index]:
                expected.append(((t + 1) * NUM_ENVS, index, sum(rewards[index]), len(rewards[index])))
                rewards[index].clear()
    rows = read_csv(folder / "episodes.csv")
    names = ("global_step", "env_index", "episodic_return", "episodic_length")
    assert [tuple(float(row[name]) for name in names) for row in rows] == expected
    assert len(expected) > 10


def test_time_limits_can_count_as_terminations(script, toy_envs, tmp_path):
    default, published = (train(script, run_dir=tmp_path, bootstrap_truncation=flag) for flag in (True, False))
    assert read_json(published / "args.json")["args"]["bootstrap_truncation"] is False
    first, second = (read_csv(folder / "metrics.csv")[0] for folder in (default, published))
    assert first["charts/episodic_return"] == second["charts/episodic_return"]  # the same rollout,
    assert first["losses/value_loss"] != second["losses/value_loss"]  # other targets


# ---- Interrupted and continued ---------------------------------------------------------------------------------
def test_a_failure_is_recorded(broken_off):
    result = read_json(broken_off / "result.json")
    assert result["status"] == "failed" and result["error"] == "RuntimeError: pulled the plug"
    assert result["global_step"] == 5 * BATCH
    assert load_checkpoint(broken_off)["global_step"] == 4 * BATCH
    assert [int(row["global_step"]) for row in read_csv(broken_off / "metrics.csv")][-1] == 5 * BATCH


def test_resume_equals_resume(script, broken_off, tmp_path):
    """The rows after the checkpoint, which the first run has written, are replaced and not doubled."""
    copies = [resume(script, shutil.copytree(broken_off, tmp_path / name)) for name in ("one", "two")]
    for name in ("metrics.csv", "episodes.csv"):
        one, two = (without_time(read_csv(copy / name)) for copy in copies)
        assert one == two
        before = [row for row in read_csv(broken_off / name) if int(row["global_step"]) <= 4 * BATCH]
        assert read_csv(copies[0] / name)[: len(before)] == before  # with the times
    assert same(*(load_checkpoint(copy) for copy in copies))
    assert load_checkpoint(copies[0])["global_step"] == ITERATIONS * BATCH
    for copy in copies:
        assert_csv_in_order(copy)
        assert_tensorboard_is_metrics_csv(copy)
        assert read_json(copy / "result.json")["status"] == "finished"
        assert len([*copy.glob("events.out.tfevents.*")]) == 2


@pytest.mark.parametrize("iterations", [1, 4])
def test_resume_equals_a_run_without_interruption(script, toy_envs, tmp_path, monkeypatch, iterations):
    """Where the environments have nothing to remember: everything that a run holds is in its checkpoint."""
    clock = for_actions(script, "toy/Clock-v0")
    whole = train(script, run_dir=tmp_path / "whole", env_id=clock)
    with monkeypatch.context() as patch:
        after_iteration(patch, script, iterations, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit) as stop:
            train(script, run_dir=tmp_path / "parts", env_id=clock)
    assert stop.value.code == 130
    parts = resume(script, next((tmp_path / "parts").iterdir()))
    for name in ("metrics.csv", "episodes.csv"):
        assert without_time(read_csv(parts / name)) == without_time(read_csv(whole / name))
    assert same(load_checkpoint(parts), load_checkpoint(whole))


def test_a_resumed_run_learns_on_from_the_checkpoint(script, broken_off, tmp_path):
    """It neither starts again nor stands still: weights, Adam's counts and the normaliser go on."""
    before = load_checkpoint(broken_off)
    after = load_checkpoint(resume(script, shutil.copytree(broken_off, tmp_path / "copy")))
    assert not same(before["agent"], after["agent"])
    for name, weights in before["agent"].items():
        assert (after["agent"][name] - weights).abs().max() < 0.05, name  # two small iterations away
    steps = [
        [state["step"] for each in checkpoint["optimisers"] for state in each["state"].values()]
        for checkpoint in (before, after)
    ]
    assert [6 * step / 4 for step in steps[0]] == steps[1]
    assert after["obs_stats"]["count"] > before["obs_stats"]["count"] > 3 * BATCH


def test_resume_equals_resume_with_envpool(script, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        after_iteration(patch, script, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            train(script, run_dir=tmp_path / "runs", **pooled(script))
    assert stop.value.code == 143
    (folder,) = (tmp_path / "runs").iterdir()
    assert load_checkpoint(folder)["global_step"] == 3 * BATCH
    copies = [resume(script, shutil.copytree(folder, tmp_path / name)) for name in ("one", "two")]
    for name in ("metrics.csv", "episodes.csv"):
        assert without_time(read_csv(copies[0] / name)) == without_time(read_csv(copies[1] / name))
    assert same(*(load_checkpoint(copy) for copy in copies))
    assert_csv_in_order(copies[0])


def first_observations(steps: list[tuple]) -> dict[int, tuple]:
    """The observation that each environment started from."""
    first = {}
    for instance, obs, _ in steps:
        first.setdefault(instance, tuple(obs))
    return first


def test_resumed_environments_do_not_repeat_the_first_episodes(script, broken_off, toy_envs, tmp_path):
    starts = []
    copy = shutil.copytree(broken_off, tmp_path / "copy")
    for run in (lambda: train(script, run_dir=tmp_path, seed=5), lambda: resume(script, copy)):
        toy_envs.STEPS.clear()
        run()
        starts.append(set(first_observations(toy_envs.STEPS).values()))
    assert len(starts[0]) == len(starts[1]) == NUM_ENVS
    assert not starts[0] & starts[1]


@pytest.mark.parametrize("damage", ["half a new line", "last line cut", "last cell cut", "empty", "gone"])
def test_resume_repairs_csv_files_that_a_kill_left_unfinished(script, broken_off, tmp_path, damage):
    whole = resume(script, shutil.copytree(broken_off, tmp_path / "whole"))
    copy = shutil.copytree(broken_off, tmp_path / "copy")
    for name in ("metrics.csv", "episodes.csv"):
        text = (copy / name).read_bytes()
        if damage == "half a new line":
            text += f"{6 * BATCH},0.1".encode()
        elif damage == "last line cut":
            text = text[: text.rindex(b",", 0, -8)]
        elif damage == "last cell cut":
            text = text[:-3]
        elif damage == "empty":
            text = b""
        (copy / name).write_bytes(text)
        if damage == "gone":
            (copy / name).unlink()
    resume(script, copy)
    assert same(load_checkpoint(copy), load_checkpoint(whole))
    lost = damage in ("empty", "gone")
    for name in ("metrics.csv", "episodes.csv"):
        expected = [row for row in read_csv(whole / name) if not lost or int(row["global_step"]) > 4 * BATCH]
        assert without_time(read_csv(copy / name)) == without_time(expected)


def test_a_running_run_shows_no_result_of_the_past(script, broken_off, tmp_path, monkeypatch):
    """While a resumed run goes on, and after it was killed, result.json must not tell how the first part ended."""
    copy, seen = shutil.copytree(broken_off, tmp_path / "copy"), []
    after_iteration(monkeypatch, script, 1, lambda: seen.append((copy / "result.json").exists()))
    resume(script, copy)
    assert seen == [False]
    assert read_json(copy / "result.json")["status"] == "finished"


def signalled(script: str, argv: list[str], run_dir: Path, number: int, **variables: str) -> tuple[Path, str]:
    """Run the script until it has logged a few more iterations, and send it a signal: its folder and its stderr."""
    before = sum(path.stat().st_size for path in run_dir.glob("*/metrics.csv"))
    process = start(script, argv, **variables)
    try:
        wait_for(process, lambda: sum(path.stat().st_size for path in run_dir.glob("*/metrics.csv")) > before + 2000)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    (folder,) = run_dir.iterdir()
    return folder, err


@pytest.mark.full
def test_signals_end_a_run_with_a_checkpoint(script, tmp_path):
    """SIGTERM: exit status 143; SIGINT, to the continued run: 130. Both at the end of the iteration."""
    words = command(script, run_dir=tmp_path, total_timesteps=10**9, checkpoint_every=10**9, **pooled(script))
    reached = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        folder, err = signalled(script, ["--resume", str(folder)] if reached else words, tmp_path, number)
        assert "Traceback" not in err
        assert read_json(folder / "args.json")["argv"] == [str(REPO / script), *words]
        result, checkpoint = read_json(folder / "result.json"), load_checkpoint(folder)
        assert result["status"] == "interrupted" and result["signal"] == number
        assert result["global_step"] == checkpoint["global_step"] > reached
        reached = checkpoint["global_step"]
        assert_csv_in_order(folder, reached // BATCH)
    assert_tensorboard_is_metrics_csv(folder)


def test_signal_in_the_last_iteration(script, toy_envs, tmp_path, monkeypatch):
    """The run is interrupted even then; what is left to do when it continues is the model and the evaluation."""
    with monkeypatch.context() as patch:
        after_iteration(patch, script, ITERATIONS, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            train(script, run_dir=tmp_path, eval_episodes=2, save_model=True)
    (folder,) = tmp_path.iterdir()
    assert stop.value.code == 143
    assert read_json(folder / "result.json")["status"] == "interrupted" and not (folder / "model.pt").exists()
    before = load_checkpoint(folder)
    resume(script, folder)
    result = read_json(folder / "result.json")
    assert result["status"] == "finished" and len(result["eval_returns"]) == 2 and result["final_return"] is not None
    assert same(torch.load(folder / "model.pt", weights_only=True)["agent"], before["agent"])
    assert_csv_in_order(folder)


def test_signal_in_the_evaluation(script, toy_envs, tmp_path, monkeypatch):
    """It stops there and then; all of the training is in the checkpoint, whatever --checkpoint-every says."""
    module = load(script)
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
        with pytest.raises(SystemExit) as stop:
            train(script, run_dir=tmp_path, eval_episodes=2, checkpoint_every=ITERATIONS - 1)
    (folder,) = tmp_path.iterdir()
    assert stop.value.code == 143
    assert read_json(folder / "result.json")["status"] == "interrupted"
    before = (folder / "metrics.csv").read_text()
    resume(script, folder)
    result = read_json(folder / "result.json")
    assert result["status"] == "finished" and len(result["eval_returns"]) == 2
    assert (folder / "metrics.csv").read_text() == before


def test_a_run_that_is_still_alive_is_not_resumed(script, broken_off, command_line, tmp_path):
    module, folder = load(script), tmp_path / "run"
    shutil.copytree(broken_off, folder)
    held, before = module.lock_folder(folder), (folder / "metrics.csv").read_text()
    status, _, err = command_line(script, "--resume", folder)
    assert status == 2 and err == f"error: --resume {folder} is still running in another process; wait for it or stop it first\n"
    assert (folder / "metrics.csv").read_text() == before and (folder / "result.json").exists()
    os.close(held)
    resume(script, folder)
    assert read_json(folder / "result.json")["status"] == "finished"
    os.close(module.lock_folder(folder))  # let go at the end


def test_a_folder_that_cannot_be_written_is_not_resumed(script, broken_off, command_line, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)

    def refuse(path, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    status, _, err = command_line(script, "--resume", folder)
    assert status == 2 and err.startswith(f"error: --resume {folder} cannot be written: ") and err.count("\n") == 1


def test_a_run_of_a_device_that_is_not_here_goes_on_elsewhere_if_told_so(script, broken_off, command_line, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    content = read_json(folder / "args.json")
    content["args"]["device"] = "cuda"
    (folder / "args.json").write_text(json.dumps(content))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = command_line(script, "--resume", folder)
    assert (status, err) == (2, "error: --device cuda: PyTorch finds no CUDA device here; use --device cpu\n")
    resume(script, folder, "--device", "cpu")
    assert read_json(folder / "result.json")["status"] == "finished"


def test_a_csv_file_that_cannot_be_closed_does_not_hide_the_failure(script, toy_envs, tmp_path, monkeypatch):
    """As on a disk that is full: the row is refused, and refused again when the file is closed."""
    module = load(script)

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, text):
            raise OSError(28, "No space left on device")

        def close(self):
            self.file.close()
            raise OSError(28, "No space left on device")

    def fill(run, *arguments):
        run.csv_files["metrics.csv"] = Full(run.csv_files["metrics.csv"])
        return log(run, *arguments)

    log = module.Run.log
    monkeypatch.setattr(module.Run, "log", fill)
    with pytest.raises(OSError, match="No space left"):
        train(script, run_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert read_json(folder / "result.json")["status"] == "failed"


@pytest.mark.parametrize("platform, renderer", [("linux", "egl"), ("darwin", None), ("win32", None)])
def test_the_film_of_a_task_without_end_ends(script, tmp_path, monkeypatch, platform, renderer):
    """And MuJoCo is told to draw through EGL on Linux alone; a renderer that the user names stays."""
    module, steps = load(script), []

    class Endless(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, dtype=np.float32), {}

        def step(self, action):
            steps.append(action)
            return np.zeros(2, dtype=np.float32), 0.0, False, False, {}

    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(gym, "make", lambda *arguments, **settings: Endless())
    monkeypatch.setattr(gym.wrappers, "RecordVideo", lambda env, *arguments, **settings: env)
    monkeypatch.setattr(module, "load_policy", lambda path: lambda obs: 0)
    module.film("Endless-v0", tmp_path / "model.pt", tmp_path, 1)
    assert len(steps) == 5_000 and os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.delenv("MUJOCO_GL")
    module.film("Endless-v0", tmp_path / "model.pt", tmp_path, 1)
    assert os.environ.get("MUJOCO_GL") == renderer


def test_second_signal_ends_a_run_at_once(tmp_path):
    """For those who cannot wait for the end of an iteration, here an endless one. The code is shared: one script."""
    script = "ppo_continuous.py"
    process = start(script, command(script, run_dir=tmp_path, num_steps=10**6, total_timesteps=10**9, **pooled(script)))
    try:
        wait_for(process, lambda: [path for path in tmp_path.glob("*/episodes.csv") if path.stat().st_size])
        threading.Event().wait(0.5)  # from the last file to the loop
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) in (-signal.SIGINT, 130)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.full
def test_a_kill_at_any_moment_leaves_a_run_that_continues(script, tmp_path, monkeypatch):
    process = start(script, command(script, run_dir=tmp_path, total_timesteps=10**9, checkpoint_every=1, **pooled(script)))
    delay = random.SystemRandom().uniform(0, 0.5)
    try:
        (path,) = wait_for(process, lambda: [*tmp_path.glob("*/checkpoint.pt")])
        threading.Event().wait(delay)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    folder = path.parent
    assert not (folder / "result.json").exists()
    assert read_json(folder / "args.json")["args"]["checkpoint_every"] == 1
    reached = load_checkpoint(folder)["global_step"] // BATCH
    for name in ("metrics.csv", "episodes.csv"):
        with open(folder / name, "a") as file:
            file.write(f"{(reached + 1) * BATCH},0.")
    after_iteration(monkeypatch, script, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        resume(script, folder)
    assert load_checkpoint(folder)["global_step"] == (reached + 3) * BATCH, f"killed after {delay:.3f} s"
    assert_csv_in_order(folder, reached + 3)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(script, toy_envs, tmp_path, monkeypatch):
    """The disk is full half way through the second checkpoint."""
    kept, saved = [], []
    save = torch.save

    def save_until_full(state, path):
        saved.append(path)
        if len(saved) == 1:
            return save(state, path)
        kept.append((next(tmp_path.iterdir()) / "checkpoint.pt").read_bytes())
        Path(path).write_bytes(kept[0][: len(kept[0]) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_until_full)
        with pytest.raises(OSError):
            train(script, run_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert len(saved) == 2
    assert (folder / "checkpoint.pt").read_bytes() == kept[0]
    assert load_checkpoint(folder)["global_step"] == 2 * BATCH
    result = read_json(folder / "result.json")
    assert result["status"] == "failed" and os.strerror(errno.ENOSPC) in result["error"]
    assert resume(script, folder) == folder
    assert read_json(folder / "result.json")["status"] == "finished"
    assert {path.name for path in folder.iterdir() if path.suffix == ".new"} == set()


# ---- Weights and Biases ----------------------------------------------------------------------------------------
@pytest.mark.full
def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    """Offline, and in processes of their own because W&B patches TensorBoard for good. Shared code: one script.
    In the working directory, where W&B links the event file into its own folder: that must not be one that is read."""
    script = "blpo_continuous.py"
    monkeypatch.chdir(tmp_path)
    words = command(script, run_dir="runs", total_timesteps=10**9, track=True, **pooled(script))
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "HOME": str(tmp_path)}
    folder, _ = signalled(script, words, tmp_path / "runs", signal.SIGTERM, **offline)
    again = start(script, ["--resume", str(folder)], **offline)
    try:
        stored = wait_for(again, lambda: (found := [*tmp_path.glob("**/offline-run-*/*.wandb")])[1:] and found)
    finally:
        again.kill()  # its end would take W&B 10 seconds
        again.communicate()
    assert len(stored) == 2
    ids = {path.stem.removeprefix("run-") for path in stored}
    assert ids == {re.sub(r"[^\w-]", "_", folder.name)}
    assert any(b"losses/value_loss" in path.read_bytes() for path in stored)  # the TensorBoard scalars go along
    assert [path for path in tmp_path.glob("wandb/**/events.out.tfevents.*") if path.is_symlink()], "W&B made no link"
    assert [path for path in (tmp_path / "runs").rglob("*") if path.is_symlink() or "wandb" in path.name] == []
    assert {path.parent for path in (tmp_path / "runs").rglob("events.out.tfevents.*")} == {folder}  # one run for TensorBoard


def test_wandb_that_refuses_leaves_no_folder(script, command_line, tmp_path, monkeypatch):
    """Such as without a key: one sentence, and no folder that looks like a run."""

    def init(**settings):
        raise RuntimeError("api_key not configured (no-tty). call wandb.login()")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__="installed"))
    status, _, err = command_line(script, *command(script, run_dir=tmp_path / "runs", track=True))
    assert status == 2
    assert err.startswith("error: --track") and "api_key not configured" in err and len(err.splitlines()) == 1
    assert [*tmp_path.glob("runs/*")] == []
