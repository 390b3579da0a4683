"""What the tests of the scripts share: the list of the scripts, tiny runs, and ways to start and to stop them."""

import csv
import ctypes.util
import importlib
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "ppo_continuous.py", "blpo_continuous.py", "blpo_continuous_ablations.py", "ppo_discrete.py", "blpo_discrete.py",
]  # fmt: skip
BLPO_SCRIPTS = [name for name in SCRIPTS if name.startswith("blpo")]
DISCRETE_SCRIPTS = [name for name in SCRIPTS if "discrete" in name]
CONTINUOUS_SCRIPTS = [name for name in SCRIPTS if "continuous" in name]

for folder in (REPO / "tests", REPO):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
torch.set_num_threads(1)
# Recorded runs are compared to a few units of rounding: MKL computes alike on every processor, here and in what the tests start.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
# mujoco chooses how it draws when it is first imported, by whichever test of this process that is.
if ctypes.util.find_library("EGL"):
    os.environ.setdefault("MUJOCO_GL", "egl")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # Started in the background of a script. The programs that the tests start would ignore Ctrl-C as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if label := os.environ.get("FAKE_TORCH_LABEL"):  # .ci/run: no test may depend on the local label of this machine's wheel
    torch.__version__ = torch.torch_version.TorchVersion(f"{torch.__version__.split('+')[0]}+{label}")

NUM_ENVS, NUM_STEPS, ITERATIONS = 2, 32, 6
BATCH = NUM_ENVS * NUM_STEPS
WALK = "toy_envs:Walk-v0"  # the module is imported by the id itself, in this process and in others
TINY = {
    "num_envs": NUM_ENVS, "num_steps": NUM_STEPS, "total_timesteps": ITERATIONS * BATCH,
    "num_minibatches": 2, "update_epochs": 2, "actor_width": 8, "critic_width": 8, "checkpoint_every": 2, "device": "cpu",
}  # fmt: skip
TINY_BLPO = {"nystrom_rank": 3}


def for_actions(script: str, toy: str) -> str:
    """The toy task, or its twin with discrete actions if the script needs these."""
    return toy.replace("-v0", "Discrete-v0") if script in DISCRETE_SCRIPTS else toy


def pooled(script: str) -> dict[str, str]:
    """A task of EnvPool with the actions of the script, in which a fresh policy fails after about 8 steps, or 20."""
    return {"env_id": "CartPole-v1" if script in DISCRETE_SCRIPTS else "InvertedPendulum-v4", "env_backend": "envpool"}


def command(script: str, **changes) -> list[str]:
    """The command line of a tiny run of `script`: TINY, changed. True, False: --flag, --no-flag; None: left out."""
    argv, tiny = [], {"env_id": for_actions(script, WALK)} | TINY
    for name, value in (tiny | (TINY_BLPO if script in BLPO_SCRIPTS else {}) | changes).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            argv += [f"--{flag}", str(value)]
    return argv


class Reads(TorchDispatchMode):
    """Counts how often a number is read out of a tensor, for which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def load(script: str):
    """The script as a module."""
    return importlib.import_module(Path(script).stem)


def parse(script: str, words: list[str]):
    """The words of a command line as Args of the script."""
    return load(script).parse_args(words)


def train(script: str, *words: str, **changes) -> Path:
    """A tiny run in this process; returns its folder."""
    return load(script).train(parse(script, [*command(script, **changes), *map(str, words)]))


def resume(script: str, folder: Path, *words: str) -> Path:
    """Continue the run in `folder` in this process; returns its folder."""
    return load(script).train(parse(script, ["--resume", str(folder), *map(str, words)]))


def after_iteration(monkeypatch, script: str, iterations: int, act) -> None:
    """Let `act()` happen at the end of the `iterations`-th iteration that is logged from now on."""
    module, logged = load(script), []
    original = module.Run.log

    def log(run, *arguments):
        original(run, *arguments)
        logged.append(1)
        if len(logged) == iterations:
            act()

    monkeypatch.setattr(module.Run, "log", log)


def another_is_faster(monkeypatch, run_dir: Path) -> list[Path]:
    """The first folder that is to be made in `run_dir` is made by another run just before; it is put in the list."""
    mkdir, taken = Path.mkdir, []

    def late(path, *arguments, **options):
        if path.parent == run_dir and not taken:
            taken.append(path)
            mkdir(path)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    return taken


def environment(**variables: str) -> dict[str, str]:
    """The environment of a child process that finds the toy tasks and uses one thread."""
    return os.environ | {"PYTHONPATH": str(REPO / "tests"), "OMP_NUM_THREADS": "1"} | variables


def start(script: str, argv: list[str], **variables: str) -> subprocess.Popen:
    """The script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(REPO / script), *argv], env=environment(**variables), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(process: subprocess.Popen, found, seconds: float = 120):
    """What `found()` returns once that is true; fails if the process ends before."""
    limit = time.monotonic() + seconds
    while not (result := found()):
        assert process.poll() is None, f"ended too early:\n{process.communicate()[1]}"
        assert time.monotonic() < limit, "took too long"
        time.sleep(0.02)
    return result


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file; none may be longer or shorter than the header."""
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    assert all(len(row) == len(header) for row in rows), f"ragged rows in {path}"
    return [dict(zip(header, row)) for row in rows]


def without_time(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The columns that do not depend on the clock."""
    clocks = ("wall_time_s", "charts/SPS", "time/")
    return [{name: value for name, value in row.items() if not name.startswith(clocks)} for row in rows]


@pytest.fixture(params=SCRIPTS, scope="session")
def script(request) -> str:
    """Each script in turn."""
    return request.param


@pytest.fixture(scope="session")
def toy_envs():
    """The toy tasks, registered."""
    return importlib.import_module("toy_envs")


@pytest.fixture(scope="session")
def finished(script, toy_envs, tmp_path_factory) -> SimpleNamespace:
    """A tiny run that ended well, and what really happened in its environments from its first step on: the first NUM_ENVS
    instances are those of the training, one more plays. Read only."""
    words = command(script, run_dir=tmp_path_factory.mktemp("finished"), save_model=True, eval_episodes=3, seed=3)
    args, opened = parse(script, words), load(script).Run.open
    with pytest.MonkeyPatch.context() as patch:

        def open_and_forget(run):  # what the task did while it was tried
            opened(run)
            toy_envs.EPISODES.clear()
            toy_envs.STEPS.clear()

        patch.setattr(load(script).Run, "open", open_and_forget)
        folder = load(script).train(args)
    return SimpleNamespace(folder=folder, args=args, episodes=list(toy_envs.EPISODES), steps=list(toy_envs.STEPS))


@pytest.fixture(scope="session")
def broken_off(script, toy_envs, tmp_path_factory) -> Path:
    """The folder of a tiny run that failed one iteration after its second checkpoint. Read only: copy it."""
    run_dir = tmp_path_factory.mktemp("broken_off")
    with pytest.MonkeyPatch.context() as patch:

        def fail():
            raise RuntimeError("pulled the plug")

        after_iteration(patch, script, 5, fail)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(script, run_dir=run_dir, seed=5)
    (folder,) = run_dir.iterdir()
    (events,) = folder.glob("events.*")
    events.rename(folder / f"events.out.tfevents.1{events.name[-4:]}")  # TensorBoard reads event files by name, the second is in it
    return folder


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Call a script as the shell does, but in this process, which saves the imports: (status, stdout, stderr).
    An exception that the script lets through fails the test. Warnings count as output on stderr."""

    def call(script: str, *argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(REPO / script), *map(str, argv)])
        capsys.readouterr()
        status = 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", UserWarning)
            try:
                runpy.run_path(str(REPO / script), run_name="__main__")
            except SystemExit as stop:
                status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, "".join(f"{warning.message}\n" for warning in caught) + printed.err

    return call
