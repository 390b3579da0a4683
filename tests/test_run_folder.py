"""What a run writes is complete and true, survives signals, kills, full disks and absent readers, and can be continued exactly."""

import csv
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
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    BATCH, BLPO_SCRIPTS, DISCRETE_SCRIPTS, ITERATIONS, NUM_ENVS, NUM_STEPS, REPO, TINY, after_iteration, another_is_faster,
    command, environment, for_actions, load, pooled, read_csv, resume, start, train, wait_for, without_time,
)  # fmt: skip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ONE = "ppo_continuous.py"  # for what is in a shared block
only_one = pytest.mark.parametrize("script", [ONE], indirect=True)
CSV = ("metrics.csv", "episodes.csv")


def load_checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def read_json(path: Path) -> dict:
    """Strict JSON: no NaN, no Infinity."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def rows(folder: Path) -> list:
    """Both csv files without the columns that depend on the clock."""
    return [without_time(read_csv(folder / name)) for name in CSV]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: tag -> (step, value), all of them."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def same(a, b) -> bool:
    """Whether two checkpoints are bitwise equal, but for the wall time, which is in the csv files as well."""
    if isinstance(a, dict):
        names = a.keys() - {"wall_time", "csv_lengths"}
        return names == b.keys() - {"wall_time", "csv_lengths"} and all(same(a[name], b[name]) for name in names)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def assert_csv_in_order(folder: Path, iterations: int = ITERATIONS) -> None:
    """Each step once and increasing, also the wall time; episodes in order and on time."""
    metrics, episodes = (read_csv(folder / name) for name in CSV)
    assert [int(row["global_step"]) for row in metrics] == [BATCH * (i + 1) for i in range(iterations)]
    times = [float(row["wall_time_s"]) for row in metrics]
    assert all(before < after for before, after in zip([0.0, *times], times))
    steps = [(int(row["global_step"]), int(row["env_index"])) for row in episodes]
    assert steps and steps == sorted(set(steps)) and steps[-1][0] <= iterations * BATCH
    times = [float(row["wall_time_s"]) for row in episodes]
    assert times == sorted(times)


def assert_tensorboard_is_metrics_csv(folder: Path) -> None:
    """The same scalars at the same steps; an empty cell is no scalar."""
    shown, table = scalars(folder), read_csv(folder / "metrics.csv")
    names = table[0].keys() - {"global_step", "wall_time_s"}
    assert set(shown) <= names
    for name in names:
        assert shown.get(name, []) == [(int(row["global_step"]), float(np.float32(row[name]))) for row in table if row[name]], name


# ---- A finished run --------------------------------------------------------------------------------------------
COLUMNS = {  # of commit 8e19e7e, which benchmark/ reads
    "global_step", "wall_time_s", "charts/episodic_return", "charts/episodic_length", "charts/SPS", "losses/value_loss",
    "losses/policy_loss", "losses/entropy", "losses/old_approx_kl", "losses/approx_kl", "losses/clipfrac",
    "losses/explained_variance", "charts/learning_rate", "time/env", "time/policy", "time/update",
}  # fmt: skip
BILEVEL_COLUMNS = {
    "bilevel/direct_norm", "bilevel/correction_norm", "bilevel/norm_ratio", "bilevel/cosine", "bilevel/weight_mean",
    "bilevel/weight_std", "bilevel/ihvp_residual", "bilevel/ihvp_cosine", "bilevel/inner_gradient_norm_before",
    "bilevel/inner_gradient_norm_after", "bilevel/fallbacks", "time/nested_critic", "time/response",
}  # fmt: skip


def test_files_of_a_finished_run(script, finished):
    names = {path.name for path in finished.folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert names - events == {"args.json", "episodes.csv", "metrics.csv", "checkpoint.pt", "model.pt", "result.json", ".lock"}
    saved = read_json(finished.folder / "args.json")
    module = load(script)
    assert module.Args(**saved["args"]) == finished.args and saved["args"].keys() == module.Args.model_fields.keys() - {"resume"}
    assert saved["args"]["exp_name"] == Path(script).stem and saved["script"] == script and saved["argv"] == sys.argv
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True)
    if git.returncode == 0:
        assert saved["commit"].removesuffix("-dirty") == git.stdout.strip()
    assert saved["versions"].keys() >= {"python", "torch", "numpy", "gymnasium", "envpool", "mujoco"}
    # PyPI's wheel calls itself 2.13.0 in its metadata and 2.13.0+cu130 in torch.__version__
    assert saved["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert saved["versions"]["numpy"] == np.__version__


def test_metrics_csv_and_tensorboard(script, finished):
    assert_csv_in_order(finished.folder)
    assert_tensorboard_is_metrics_csv(finished.folder)
    episodes = read_csv(finished.folder / "episodes.csv")
    for row in read_csv(finished.folder / "metrics.csv"):
        assert row.keys() == COLUMNS | (BILEVEL_COLUMNS if script in BLPO_SCRIPTS else set())
        parts = [float(row[f"time/{part}"]) for part in ("env", "policy", "update")]
        assert min(parts) > 0 and sum(parts) < float(row["wall_time_s"])
        assert all(math.isfinite(float(value)) for value in row.values() if value)
        step = int(row["global_step"])
        mine = [each for each in episodes if step - BATCH < int(each["global_step"]) <= step]
        for name in ("episodic_return", "episodic_length"):
            assert float(row[f"charts/{name}"]) == pytest.approx(np.mean([float(each[name]) for each in mine]), rel=1e-12)


def instances(finished) -> tuple[list[int], int]:
    """The environments of the training, and the one that was played."""
    *training, played = sorted({instance for instance, *_ in finished.steps})
    assert len(training) == NUM_ENVS
    return training, played


def test_every_episode_that_ended_is_logged_with_its_return_and_length(finished):
    """Against the environments' own record. An episode and the reset after it take one step more than it is long."""
    training, _ = instances(finished)
    expected, steps = [], dict.fromkeys(training, 0)
    for instance, episodic_return, length, _ in finished.episodes:
        if instance in steps:
            expected.append((NUM_ENVS * (steps[instance] + length), training.index(instance), episodic_return, length))
            steps[instance] += length + 1
    expected.sort()
    names = {"global_step": int, "env_index": int, "episodic_return": float, "episodic_length": int}
    found = [tuple(kind(row[name]) for name, kind in names.items()) for row in read_csv(finished.folder / "episodes.csv")]
    assert {how for *_, how in finished.episodes} == {"terminated", "truncated"}
    assert len(found) == len(expected) > 30
    assert [row[:2] + row[3:] for row in found] == [row[:2] + row[3:] for row in expected]
    np.testing.assert_allclose([row[2] for row in found], [row[2] for row in expected], rtol=1e-12)


def test_result_json(finished):
    result, last = read_json(finished.folder / "result.json"), read_csv(finished.folder / "metrics.csv")[-1]
    assert result["status"] == "finished" and "error" not in result
    assert result["global_step"] == int(last["global_step"]) == ITERATIONS * BATCH
    assert result["wall_time_s"] == float(last["wall_time_s"])
    late = [row for row in read_csv(finished.folder / "episodes.csv") if int(row["global_step"]) > 0.9 * ITERATIONS * BATCH]
    assert late and result["final_return"] == pytest.approx(np.mean([float(row["episodic_return"]) for row in late]))
    _, played = instances(finished)
    returns = [episodic_return for instance, episodic_return, *_ in finished.episodes if instance == played]
    assert result["eval_returns"] == pytest.approx(returns, rel=1e-6) and len(returns) == 3


def test_final_return_of_steps_that_are_no_whole_number_of_rollouts(toy_envs, tmp_path):
    """Training ends at 2 rollouts of the 2.9 that were asked for; its last tenth is that of the 2."""
    folder = train(ONE, run_dir=tmp_path, total_timesteps=int(2.9 * BATCH))
    late = [row for row in read_csv(folder / "episodes.csv") if int(row["global_step"]) > 0.9 * 2 * BATCH]
    result = read_json(folder / "result.json")
    assert result["global_step"] == 2 * BATCH
    assert late and result["final_return"] == pytest.approx(np.mean([float(row["episodic_return"]) for row in late]))


def test_an_iteration_without_an_episode_leaves_its_cells_empty(tmp_path):
    """Not 0, which would be a return; TensorBoard has no scalar there."""
    folder = train(ONE, run_dir=tmp_path, env_id="toy_envs:toy/Clock-v0", num_steps=16)  # its episodes take 31 steps
    for name in ("charts/episodic_return", "charts/episodic_length"):
        cells = [row[name] for row in read_csv(folder / "metrics.csv")]
        assert cells[::2] == [""] * ITERATIONS and all(cells[1::2])
    assert [step for step, _ in scalars(folder)["charts/episodic_length"]] == [BATCH * (i + 1) for i in range(ITERATIONS)]


# ---- The policy that is saved ----------------------------------------------------------------------------------
def policy_by_hand(path: Path, obs: np.ndarray) -> np.ndarray:
    """The most probable action in numpy, all in float64: normalise, clip to +-10, two tanh layers; then the mean, clipped
    to the action box, or the number of the largest logit, counted from the first action's."""
    saved = {name: tensor.double().numpy() for name, tensor in torch.load(path, weights_only=True)["agent"].items()}
    network = "actor_logits" if "actor_logits.0.weight" in saved else "actor_mean"
    x = np.clip((obs.astype(np.float64) - saved["obs_mean"]) / saved["obs_std"], -10, 10)
    for layer in (0, 2):
        x = np.tanh(x @ saved[f"{network}.{layer}.weight"].T + saved[f"{network}.{layer}.bias"])
    x = x @ saved[f"{network}.4.weight"].T + saved[f"{network}.4.bias"]
    if network == "actor_logits":
        return x.argmax(-1) + int(saved["first_action"])
    return np.clip(x, saved["action_low"], saved["action_high"])


@pytest.mark.parametrize("name", ["model.pt", "checkpoint.pt"])
def test_the_saved_policy_is_the_one_that_was_played(script, finished, name):
    """And far outside of what the training saw the normaliser's bound of 10 counts; one row or many."""
    _, played = instances(finished)
    observations, actions = (np.stack(each) for each in zip(*[step[1:] for step in finished.steps if step[0] == played]))
    policy = load(script).load_policy(finished.folder / name)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(policy(observations), actions, **close)
    np.testing.assert_allclose(policy_by_hand(finished.folder / name, observations), actions, **close)
    far = np.array([[1e9, 0, 0], [-1e9, 1e3, -1e3], [0, 0, 1e6]], dtype=np.float32)
    np.testing.assert_allclose(policy(far), policy_by_hand(finished.folder / name, far), **close)
    np.testing.assert_allclose(policy(far[1]), policy_by_hand(finished.folder / name, far)[1], **close)
    assert len(np.unique(actions, axis=0)) > 1


def test_actions_reach_the_environment_as_its_space_has_them(script, toy_envs, finished):
    """Clipped to a box, whose ends are reached; or numbered from the first, and each of them tried."""
    actions = np.stack([action for *_, action in finished.steps])
    if script in DISCRETE_SCRIPTS:
        assert set(actions.tolist()) == {2, 3, 4}
    else:
        box = toy_envs.Walk.action_space
        assert (actions >= box.low).all() and (actions <= box.high).all()
        assert (actions[:, 0] == box.low[0]).any() and (actions[:, 0] == box.high[0]).any()


@only_one
def test_the_model_holds_the_normaliser_of_the_training(script, finished):
    """The statistics of the observations that the policy answered and, as a start, of 1e-4 rows of mean 0, variance 1;
    the last two observations, which nothing answered, make the tolerance."""
    saved = torch.load(finished.folder / "model.pt", weights_only=True)["agent"]
    answered = np.stack([obs for instance, obs, _ in finished.steps if instance in instances(finished)[0]]).astype(np.float64)
    count = len(answered) + 1e-4
    mean = answered.sum(0) / count
    variance = (((answered - mean) ** 2).sum(0) + 1e-4 * (1 + mean**2)) / count
    np.testing.assert_allclose(saved["obs_mean"], mean, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(saved["obs_std"], np.sqrt(variance + 1e-8), rtol=0.02)


@pytest.mark.parametrize("script", ["ppo_continuous.py", "ppo_discrete.py"], indirect=True)
def test_the_policy_exports_with_its_normaliser(script, finished, tmp_path):
    """As a graph for batches of any size; observations far from 0 would show a normaliser in float32."""
    agent = load(script).load_policy(finished.folder / "model.pt")
    agent.obs_mean.add_(1e6)
    exported = torch.export.export(agent, (torch.zeros(2, 3),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(exported, tmp_path / "policy.pt2")
    again = torch.export.load(tmp_path / "policy.pt2").module()
    for size in (1, 7):
        obs = 1e6 + 600 * torch.randn(size, 3)
        torch.testing.assert_close(again(obs), agent(obs))
    assert len(torch.unique(again(1e6 + 600 * torch.randn(100, 3)), dim=0)) > 1


def test_playing_normalises_in_float64_as_training_does(monkeypatch, tmp_path):
    """Of the last observation the training makes the same numbers, to the bit, as the saved agent."""
    module, step_of, raw, inputs = load(ONE), gym.vector.SyncVectorEnv.step, [], []

    def step(envs, actions):
        result = step_of(envs, actions)
        raw.append(result[0].copy())
        return result

    def keep(critic, arguments):
        if len(arguments[0]) == (NUM_STEPS + 1) * NUM_ENVS:  # a whole rollout and the observations after it
            inputs.append(arguments[0][-NUM_ENVS:].clone())

    class Watched(module.Agent):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.critic.register_forward_pre_hook(keep)

    with monkeypatch.context() as patch:
        patch.setattr(gym.vector.SyncVectorEnv, "step", step)
        patch.setattr(module, "Agent", Watched)
        folder = train(ONE, run_dir=tmp_path, total_timesteps=BATCH)
    agent = module.load_policy(folder / "checkpoint.pt")
    monkeypatch.setattr(agent.actor_mean, "forward", lambda obs: (inputs.append(obs), torch.zeros(len(obs), 2))[1])
    agent(torch.from_numpy(raw[-1]))
    assert len(inputs) == 2 and torch.equal(*inputs) and inputs[0].abs().max() > 0.1


def first_observations(steps: list[tuple]) -> dict[int, tuple]:
    """The observation that each environment started from."""
    first = {}
    for instance, obs, _ in steps:
        first.setdefault(instance, tuple(obs))
    return first


def test_playing_starts_from_other_seeds_and_does_not_change_the_training(script, finished, tmp_path):
    starts = first_observations(finished.steps)
    assert len(starts) == len(set(starts.values())) == NUM_ENVS + 1
    folder = train(script, run_dir=tmp_path, seed=3)
    assert same(load_checkpoint(folder), load_checkpoint(finished.folder))
    assert not (folder / "model.pt").exists()


def test_a_discrete_action_is_played_as_the_number_it_was_in_training(tmp_path, monkeypatch, toy_envs):
    """Not as an array, which no table looks up."""
    monkeypatch.setattr(toy_envs.DiscreteClock, "push", lambda self, action: {-1: -1.0, 0: 0.0, 1: 1.0}[action])
    assert train("ppo_discrete.py", run_dir=tmp_path, env_id="toy_envs:toy/ClockDiscrete-v0", eval_episodes=1).is_dir()


# ---- The folder's name -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id, safe", [("toy_envs:Walk-v0", "toy_envs_Walk-v0"), ("toy_envs:toy/Walk-v0", "toy_envs_toy_Walk-v0")])
def test_the_folder_is_named_after_the_run(tmp_path, env_id, safe):
    folder = train(ONE, run_dir=tmp_path / "a" / "b", env_id=env_id, total_timesteps=BATCH, exp_name="a try/2", seed=7)
    assert folder.parent == tmp_path / "a" / "b" and [*folder.parent.iterdir()] == [folder]
    assert re.fullmatch(rf"{safe}__a_try_2__7__\d{{10}}", folder.name)


def test_runs_of_the_same_second_have_their_own_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    folders = [train(ONE, run_dir=tmp_path, total_timesteps=BATCH) for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(read_json(folder / "result.json")["status"] == "finished" for folder in folders)


def test_a_folder_that_another_run_makes_first_is_left_to_it(tmp_path, monkeypatch):
    """Two runs of the same second: both have seen that no folder has the name."""
    taken = another_is_faster(monkeypatch, tmp_path)
    folder = train(ONE, run_dir=tmp_path, total_timesteps=BATCH)
    assert folder.name == taken[0].name + "_" and [*taken[0].iterdir()] == []
    assert read_json(folder / "result.json")["status"] == "finished"


# ---- Repeats ---------------------------------------------------------------------------------------------------
def test_the_same_command_repeats_bitwise_and_another_seed_differs(script, toy_envs, tmp_path):
    first, second, other = (train(script, run_dir=tmp_path, seed=seed) for seed in (5, 5, 6))
    assert rows(first) == rows(second) != rows(other)
    assert same(load_checkpoint(first), load_checkpoint(second))
    assert not same(load_checkpoint(first)["agent"], load_checkpoint(other)["agent"])


@pytest.mark.parametrize("backend", ["envpool", "sync", "async"])
def test_each_backend_repeats_bitwise_and_trains_on_the_task(tmp_path, backend):
    """A fresh policy falls after 4 to 40 steps."""
    first, second = (train(ONE, run_dir=tmp_path, **pooled(ONE) | {"env_backend": backend}) for _ in range(2))
    assert rows(first) == rows(second) and same(load_checkpoint(first), load_checkpoint(second))
    assert_csv_in_order(first)
    assert 4 < np.mean([int(row["episodic_length"]) for row in read_csv(first / "episodes.csv")]) < 20


def test_sync_and_async_are_the_same_run(tmp_path):
    sync, parallel = (train(ONE, run_dir=tmp_path / backend, env_backend=backend) for backend in ("sync", "async"))
    assert rows(sync) == rows(parallel) and same(load_checkpoint(sync), load_checkpoint(parallel))


@pytest.mark.parametrize("where", ["main thread", "thread"])
def test_from_python_the_run_is_that_of_the_command_line(tmp_path, where):
    module, found = load(ONE), []
    shape = TINY | {"env_id": "toy_envs:Walk-v0"}
    before = signal.getsignal(signal.SIGINT)

    def call():
        found.append(module.train(module.Args(run_dir=tmp_path / "python", **shape)))

    if where == "thread":
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    else:
        call()
    shell = train(ONE, run_dir=tmp_path / "shell")
    assert rows(found[0]) == rows(shell) and same(load_checkpoint(found[0]), load_checkpoint(shell))
    assert signal.getsignal(signal.SIGINT) == before


# ---- Divergence ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "script, changes, quantity",
    [(ONE, {"nan": "reward"}, "rewards"), (ONE, {"nan": "observation"}, "observations"), ("ppo_discrete.py", {"nan": "reward"}, "rewards"),
     ("blpo_continuous.py", {"nan": "observation"}, "observations"),
     ("blpo_discrete.py", {"critic_learning_rate": 1e30}, "losses"), (ONE, {"learning_rate": 1e30, "max_grad_norm": "inf"}, "losses"),
     ("blpo_continuous_ablations.py", {"critic_learning_rate": 1e30, "ihvp": "pcg"}, "losses")],
)  # fmt: skip
def test_divergence_stops_a_run_with_one_sentence(command_line, toy_envs, tmp_path, monkeypatch, script, changes, quantity):
    """Exit status 1; the last good checkpoint stays, csv files say nan and result.json is strict JSON."""
    changes, steps, step_of = dict(changes), [], toy_envs.Walk.step

    def step(walk, action):
        obs, reward, *rest = step_of(walk, action)
        steps.append(action)
        late = len(steps) > 200
        return obs * np.float32("nan") if late and spoiled == "observation" else obs, math.nan if late and spoiled == "reward" else reward, *rest

    spoiled = changes.pop("nan", None)
    monkeypatch.setattr(toy_envs.Walk, "step", step)
    status, _, err = command_line(script, *command(script, run_dir=tmp_path, checkpoint_every=1, **changes))
    (folder,) = tmp_path.iterdir()
    result = read_json(folder / "result.json")
    table = read_csv(folder / "metrics.csv")
    assert status == 1 and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(rf"error: the {quantity} stopped being finite by step \d+", line)
    assert result["status"] == "diverged" and line.removeprefix("error: ") in result["error"]
    assert result["global_step"] == int(table[-1]["global_step"])
    if spoiled:
        assert load_checkpoint(folder)["global_step"] == len(table) * BATCH - BATCH > 0
        assert "nan" in table[-1].values() and not any("nan" in row.values() for row in table[:-1])
    if (folder / "checkpoint.pt").exists():
        assert all(tensor.isfinite().all() for name, tensor in load_checkpoint(folder)["agent"].items())


# ---- Interrupted, continued, extended, replayed ----------------------------------------------------------------
@only_one
def test_a_failure_is_recorded(script, broken_off):
    result = read_json(broken_off / "result.json")
    assert result["status"] == "failed" and result["error"] == "RuntimeError: pulled the plug"
    assert result["global_step"] == 5 * BATCH == int(read_csv(broken_off / "metrics.csv")[-1]["global_step"])
    assert load_checkpoint(broken_off)["global_step"] == 4 * BATCH


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
    (folder,) = (tmp_path / "parts").iterdir()
    assert read_json(folder / "result.json")["status"] == "interrupted"
    resume(script, folder)
    assert rows(folder) == rows(whole) and same(load_checkpoint(folder), load_checkpoint(whole))


@only_one
def test_resume_replaces_the_rows_after_the_checkpoint(script, broken_off, tmp_path):
    copies = [shutil.copytree(broken_off, tmp_path / name) for name in ("one", "two")]
    for copy in copies:  # TensorBoard reads by name, and names of one second and one process end in a number: 10 before 9
        (events,) = copy.glob("events.out.tfevents.*")
        events.rename(copy / "events.out.tfevents.0000000000.first")
        resume(script, copy)
    assert rows(copies[0]) == rows(copies[1]) and same(*map(load_checkpoint, copies))
    for name in CSV:
        before = [row for row in read_csv(broken_off / name) if int(row["global_step"]) <= 4 * BATCH]
        assert before and read_csv(copies[0] / name)[: len(before)] == before  # with the times
    assert load_checkpoint(copies[0])["global_step"] == ITERATIONS * BATCH
    assert_csv_in_order(copies[0])
    assert_tensorboard_is_metrics_csv(copies[0])
    assert read_json(copies[0] / "result.json")["status"] == "finished"
    assert len([*copies[0].glob("events.out.tfevents.*")]) == 2
    (argv,) = {str(read_json(folder / "args.json")["argv"]) for folder in (broken_off, *copies)}
    assert argv == str(sys.argv)


@only_one
def test_resumed_environments_do_not_repeat_the_first_episodes(script, broken_off, toy_envs, tmp_path, monkeypatch):
    opened, starts = load(script).Run.open, []
    monkeypatch.setattr(load(script).Run, "open", lambda run: (opened(run), toy_envs.STEPS.clear()))
    for run in (lambda: train(script, run_dir=tmp_path, seed=5), lambda: resume(script, shutil.copytree(broken_off, tmp_path / "copy"))):
        run()
        starts.append(set(first_observations(toy_envs.STEPS).values()))
    assert len(starts[0]) == len(starts[1]) == NUM_ENVS and not starts[0] & starts[1]


def test_a_finished_run_is_extended_with_other_arguments(toy_envs, tmp_path, capsys):
    """What changes is printed. Without annealing, the step sizes of the longer run are those of the first part."""
    clock = {"env_id": "toy/Clock-v0", "anneal_lr": False}
    whole = train(ONE, run_dir=tmp_path / "whole", total_timesteps=8 * BATCH, **clock)
    folder = train(ONE, run_dir=tmp_path / "parts", **clock)
    capsys.readouterr()
    assert resume(ONE, folder, "--total-timesteps", 8 * BATCH, "--save-model") == folder
    err = capsys.readouterr().err
    assert f"--total-timesteps was {ITERATIONS * BATCH} and is now {8 * BATCH}\n" in err and "--save-model was False and is now True\n" in err
    assert err.count(" and is now ") == 2
    assert rows(folder) == rows(whole) and same(load_checkpoint(folder)["agent"], load_checkpoint(whole)["agent"])
    assert_csv_in_order(folder, 8)
    assert read_json(folder / "args.json")["args"]["total_timesteps"] == 8 * BATCH and (folder / "model.pt").exists()
    assert read_json(folder / "result.json")["global_step"] == 8 * BATCH


def test_a_finished_run_is_replayed_and_filmed_without_training(tmp_path):
    changes = pooled(ONE) | {"env_id": "InvertedPendulum-v4"}
    folder = train(ONE, run_dir=tmp_path, **changes)
    before = (folder / "checkpoint.pt").read_bytes(), (folder / "metrics.csv").read_bytes()
    words = ["--eval-episodes", "2"]
    try:
        gym.make("InvertedPendulum-v4", render_mode="rgb_array").reset()
        words += ["--capture-video"]
    except Exception:  # nothing can draw here
        pass
    resume(ONE, folder, *words)
    assert before == ((folder / "checkpoint.pt").read_bytes(), (folder / "metrics.csv").read_bytes())
    result = read_json(folder / "result.json")
    assert result["status"] == "finished" and len(result["eval_returns"]) == 2 and result["final_return"] > 0
    policy, env, returns = load(ONE).load_policy(folder / "checkpoint.pt"), gym.make("InvertedPendulum-v4"), []
    for episode in range(2):
        obs, ended = env.reset(seed=load(ONE).derived_seed(1, 2**40 + episode))[0], False
        returns.append(0.0)
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(policy(obs).numpy())
            returns[-1] += reward
            ended = terminated or truncated
    assert result["eval_returns"] == pytest.approx(returns)


@pytest.mark.parametrize("film", [False, True])
def test_an_episode_without_end_is_cut_when_it_is_played(tmp_path, monkeypatch, film):
    """And MuJoCo is told to draw through EGL on Linux alone; a renderer that the user names stays."""
    module, steps = load(ONE), []

    class Endless(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (2,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, dtype=np.float32), {}

        def step(self, action):
            steps.append(action)
            return np.zeros(2, dtype=np.float32), 1.0, False, False, {}

    monkeypatch.setattr(gym, "make", lambda *arguments, **settings: Endless())
    monkeypatch.setattr(gym.wrappers, "RecordVideo", lambda env, *arguments, **settings: env)
    args = module.Args(env_id="Endless-v0")
    for platform, given, expected in (("linux", None, "egl"), ("darwin", None, None), ("linux", "osmesa", "osmesa")):
        steps.clear()
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        if given:
            monkeypatch.setenv("MUJOCO_GL", given)
        length = 5_000 if film else 100_000
        if film or given:
            assert module.play(lambda obs: torch.zeros(1), args, 1, tmp_path if film else None) == [length] and len(steps) == length
        else:
            module.play(None, args, 0)
        assert os.environ.get("MUJOCO_GL") == expected
    monkeypatch.delenv("MUJOCO_GL", raising=False)


@only_one
@pytest.mark.parametrize("damage", ["half a new line", "another number", "empty", "gone", "other file"])
def test_damaged_csv_files_do_not_stop_a_resume(script, broken_off, tmp_path, damage):
    """What came after the checkpoint is cut off, whatever it is; what came before it stays as it is."""
    whole = resume(script, shutil.copytree(broken_off, tmp_path / "whole"))
    copy = shutil.copytree(broken_off, tmp_path / "copy")
    for name in CSV:
        path, content = copy / name, (copy / name).read_bytes()
        if damage == "half a new line":
            path.write_bytes(content + f"{6 * BATCH},0.1".encode())
        elif damage == "another number":
            path.write_bytes(content.replace(b",0.", b",9.", 1))
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "gone":
            path.unlink()
        else:
            path.write_bytes(b"a;b\ncaf\xe9\0\n")
    resume(script, copy)
    for name in CSV:
        rows_after = [row for row in read_csv(whole / name) if int(row["global_step"]) > 4 * BATCH]
        if damage in ("half a new line", "another number"):
            found = read_csv(copy / name)
            assert len(found) == len(read_csv(whole / name))
            assert without_time(found[-len(rows_after) :]) == without_time(rows_after)
        elif damage == "other file":
            assert (copy / name).read_bytes().startswith(b"a;b\ncaf\xe9\0\n")
        else:
            assert without_time(read_csv(copy / name)) == without_time(rows_after)
    assert same(load_checkpoint(copy), load_checkpoint(whole))


def test_an_infinite_argument_is_resumed(toy_envs, tmp_path):
    folder = train(ONE, run_dir=tmp_path, max_grad_norm="inf", total_timesteps=BATCH)
    assert read_json(folder / "args.json")["args"]["max_grad_norm"] == "Infinity"
    resume(ONE, folder, "--total-timesteps", 2 * BATCH)
    assert load(ONE).Args(**read_json(folder / "args.json")["args"]).max_grad_norm == math.inf


@only_one
def test_a_running_run_shows_no_result_of_the_past(script, broken_off, tmp_path, monkeypatch):
    copy, seen = shutil.copytree(broken_off, tmp_path / "copy"), []
    after_iteration(monkeypatch, script, 1, lambda: seen.append((copy / "result.json").exists()))
    resume(script, copy)
    assert seen == [False] and read_json(copy / "result.json")["status"] == "finished"


@only_one
def test_a_folder_that_cannot_be_written_is_not_resumed(script, broken_off, command_line, tmp_path, monkeypatch):
    folder = shutil.copytree(broken_off, tmp_path / "run")

    def refuse(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", refuse)
    status, _, err = command_line(script, "--resume", folder)
    assert status == 2 and re.fullmatch("error: --run-dir: .*Permission denied.*; name another or make it writable\n", err)
    assert (folder / "result.json").exists()


# ---- Signals, kills, full disks --------------------------------------------------------------------------------
def signalled(script: str, argv: list[str], run_dir: Path, number: int, group: bool = False, **variables: str) -> tuple[Path, str]:
    """Run the script until it has logged a few more iterations, and send it a signal: its folder and its stderr."""
    before = sum(path.stat().st_size for path in run_dir.glob("*/metrics.csv"))
    process = subprocess.Popen(
        [sys.executable, str(REPO / script), *argv], env=environment(**variables), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_for(process, lambda: sum(path.stat().st_size for path in run_dir.glob("*/metrics.csv")) > before + 2000)
        (os.killpg if group else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    (folder,) = run_dir.iterdir()
    return folder, err


def test_signals_end_a_run_with_a_checkpoint(tmp_path):
    """SIGTERM: exit status 143; Ctrl-C in the terminal of the continued run, which the environments' own processes get as
    well: 130. Both at the end of the iteration; what to do next is said."""
    words = command(ONE, run_dir=tmp_path, total_timesteps=10**9, checkpoint_every=10**9, env_backend="async")
    reached = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        folder, err = signalled(ONE, words, tmp_path, number, group=number == signal.SIGINT)
        words = ["--resume", str(folder)]
        assert "Traceback" not in err and f"continue with --resume {folder}\n" in err
        result, checkpoint = read_json(folder / "result.json"), load_checkpoint(folder)
        assert result["status"] == "interrupted"
        assert result["global_step"] == checkpoint["global_step"] > reached
        reached = checkpoint["global_step"]
        assert_csv_in_order(folder, reached // BATCH)
    assert_tensorboard_is_metrics_csv(folder)


@pytest.mark.parametrize("when", ["last iteration", "evaluation"])
def test_a_signal_near_the_end(toy_envs, tmp_path, monkeypatch, when):
    """All of the training is in the checkpoint then, whatever --checkpoint-every says; what is left to do when the run
    continues is the model and the evaluation."""
    module, play = load(ONE), load(ONE).play

    def interrupt(*arguments, **settings):
        if settings.get("episodes") == 0:
            return play(*arguments, **settings)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patch:
        if when == "evaluation":
            patch.setattr(module, "play", interrupt)
        else:
            after_iteration(patch, ONE, ITERATIONS, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            train(ONE, run_dir=tmp_path, eval_episodes=2, save_model=True, checkpoint_every=ITERATIONS - 1)
    (folder,) = tmp_path.iterdir()
    assert stop.value.code == 143 and read_json(folder / "result.json")["status"] == "interrupted"
    before, table = load_checkpoint(folder), (folder / "metrics.csv").read_text()
    resume(ONE, folder)
    result = read_json(folder / "result.json")
    assert result["status"] == "finished" and len(result["eval_returns"]) == 2 and result["final_return"] is not None
    assert same(torch.load(folder / "model.pt", weights_only=True)["agent"], before["agent"])
    assert (folder / "metrics.csv").read_text() == table


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    """For those who cannot wait for the end of an iteration, here a very long one."""
    process = start(ONE, command(ONE, run_dir=tmp_path, num_steps=10**6, total_timesteps=10**9, **pooled(ONE)))
    try:
        wait_for(process, lambda: [path for path in tmp_path.glob("*/episodes.csv") if path.stat().st_size])
        time.sleep(0.5)  # from the last file to the loop
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.communicate()
    assert read_json(next(tmp_path.glob("*/result.json")))["status"] == "interrupted"


@pytest.mark.full
def test_a_kill_at_any_moment_leaves_a_run_that_continues(script, tmp_path, monkeypatch):
    process = start(script, command(script, run_dir=tmp_path, total_timesteps=10**9, checkpoint_every=1, **pooled(script)))
    delay = random.SystemRandom().uniform(0, 0.5)
    try:
        (path,) = wait_for(process, lambda: [*tmp_path.glob("*/checkpoint.pt")])
        time.sleep(delay)
    finally:
        process.kill()
        process.communicate()
    folder = path.parent
    assert process.returncode == -signal.SIGKILL and not (folder / "result.json").exists()
    reached = load_checkpoint(folder)["global_step"] // BATCH
    for name in CSV:
        with open(folder / name, "a") as file:
            file.write(f"{(reached + 1) * BATCH},0.")
    after_iteration(monkeypatch, script, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        resume(script, folder)
    assert load_checkpoint(folder)["global_step"] == (reached + 3) * BATCH, f"killed after {delay:.3f} s"
    assert_csv_in_order(folder, reached + 3)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(toy_envs, tmp_path, monkeypatch):
    """The disk is full half way through the second checkpoint; half a file would keep it full."""
    save, saved = torch.save, []

    def save_until_full(state, file):
        saved.append(state)
        if len(saved) > 1:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_until_full)
        with pytest.raises(OSError, match="No space left"):
            train(ONE, run_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    result = read_json(folder / "result.json")
    assert load_checkpoint(folder)["global_step"] == 2 * BATCH and not [*folder.glob("*.new")]
    assert result["status"] == "failed" and "No space left" in result["error"]
    resume(ONE, folder)
    assert read_json(folder / "result.json")["status"] == "finished"


def test_a_csv_file_that_cannot_be_written_or_closed_fails_the_run(toy_envs, tmp_path, monkeypatch):
    """As on a disk that is full: the row is refused, and refused again when the file is closed."""
    open_csv = load(ONE).Run.open_csv

    def full(run, *arguments):
        open_csv(run, *arguments)
        run.files[-1].close()
        run.files[-1] = open("/dev/full", "w")
        return csv.DictWriter(run.files[-1], arguments[1])

    monkeypatch.setattr(load(ONE).Run, "open_csv", full)
    with pytest.raises(OSError, match="No space left"):
        train(ONE, run_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert read_json(folder / "result.json")["status"] == "failed"


@pytest.mark.parametrize("reader", ["2> /dev/full", "2>&-", "2>&1 | head -c 0"])
def test_a_reader_that_went_away_does_not_change_the_run(tmp_path, reader):
    words = " ".join(command(ONE, run_dir=tmp_path / "runs"))
    line = f"{{ {sys.executable} {REPO / ONE} {words}; echo $? > {tmp_path / 'status'}; }} {reader}"
    subprocess.run(["bash", "-c", line], env=environment(), capture_output=True)
    wait_for(subprocess.Popen(["sleep", "60"]), (tmp_path / "status").exists)
    time.sleep(0.1)
    assert (tmp_path / "status").read_text() == "0\n"
    assert read_json(next((tmp_path / "runs").glob("*/result.json")))["status"] == "finished"


@pytest.mark.full
def test_the_second_process_on_a_folder_gets_a_sentence(tmp_path):
    words = command(ONE, run_dir=tmp_path, total_timesteps=10**9, checkpoint_every=1, **pooled(ONE))
    process = start(ONE, words)
    try:
        (path,) = wait_for(process, lambda: [*tmp_path.glob("*/checkpoint.pt")])
        second = start(ONE, ["--resume", str(path.parent)])
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2 and err == f"error: --resume {path.parent} is still running in another process\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
        process.communicate()
    resume(ONE, path.parent, "--total-timesteps", load_checkpoint(path.parent)["global_step"])


# ---- Weights and Biases ----------------------------------------------------------------------------------------
def test_the_parts_of_a_run_are_wandb_runs_of_one_group(broken_off_one, tmp_path, monkeypatch):
    """None names an id: one that is used twice offline overwrites the first part when it is synchronised."""
    settings = []

    class Recorder:
        def init(**given):
            settings.append(given)
            return Recorder

        def finish(exit_code):
            settings[-1]["exit_code"] = exit_code

    monkeypatch.setitem(sys.modules, "wandb", Recorder)
    folder = shutil.copytree(broken_off_one, tmp_path / broken_off_one.name)
    first = train(ONE, run_dir=tmp_path / "first", track=True, total_timesteps=BATCH)
    resume(ONE, first, "--total-timesteps", 2 * BATCH)
    assert {each["group"] for each in settings} == {first.name} and [each["exit_code"] for each in settings] == [0, 0]
    assert all(each["sync_tensorboard"] and not {"id", "resume"} & each.keys() for each in settings)
    assert [each["name"] for each in settings] == [f"{first.name}-{step}" for step in (0, BATCH)]
    settings.clear()
    resume(ONE, folder, "--track")
    assert settings[0]["config"]["seed"] == 5


@pytest.fixture(scope="session")
def broken_off_one(toy_envs, tmp_path_factory) -> Path:
    """A run of ONE that was interrupted after its second iteration."""
    run_dir = tmp_path_factory.mktemp("broken_off_one")
    with pytest.MonkeyPatch.context() as patch:
        after_iteration(patch, ONE, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(ONE, run_dir=run_dir, seed=5)
    return next(run_dir.iterdir())


@pytest.mark.full
def test_wandb_gets_the_scalars_and_keeps_its_folder_out_of_tensorboards(tmp_path, monkeypatch):
    """Offline, and in processes of their own because W&B patches TensorBoard for good. In the working directory, where W&B
    links the event file into its own folder: that must not be one that is read."""
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
    assert len({path.stem for path in stored}) == 2
    assert any(b"losses/value_loss" in path.read_bytes() for path in stored)  # the TensorBoard scalars go along
    assert [path for path in tmp_path.glob("wandb/**/events.out.tfevents.*") if path.is_symlink()], "W&B made no link"
    assert [path for path in (tmp_path / "runs").rglob("*") if path.is_symlink() or "wandb" in path.name] == []
    assert {path.parent for path in (tmp_path / "runs").rglob("events.out.tfevents.*")} == {folder}  # one run for TensorBoard
