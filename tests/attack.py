"""An attack on the promise of --resume: runs are killed at random moments, continued, and compared with a run left alone.

    python -m tests.attack --kills 60                            # every script that can resume: minutes
    python -m tests.attack --kills 20 --signals 10 --script stac.py

Not one of the tests, because it takes minutes and its moments are random. It uses the command line and the run folder
(docs/run_folder.md) alone. The task is `toy_envs.Clock`: after every rollout it is in the state in which it began, so a
continued run has to equal the run left alone bitwise. For each script:

1. One run is left alone.
2. Another is stopped again and again, by SIGKILL, SIGINT or SIGTERM, one time in five while it starts and otherwise after
   its first rollout, and continued with --resume.
3. After each stop: args.json and result.json are whole, checkpoint.pt loads, no complete line of a csv file is damaged,
   and every rollout that the checkpoint counts has its row. After SIGINT and SIGTERM the exit status is 130 and 143 and
   result.json says "interrupted", unless the signal came before the script could catch it.
4. When the number of stops is used up, the run is left to finish. csv files (but for times), checkpoint.pt, model.pt and
   the final return have to be those of the first run.

What was found is printed with the folder, which is kept; the exit status is then 1.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
ITERATIONS = 150
ON_POLICY = ["--num-envs", "2", "--num-steps", "64", "--num-minibatches", "2"]
OFF_POLICY = ["--num-envs", "1", "--num-steps", "32", "--update-every", "8", "--batch-size", "16"]
OFF_POLICY += ["--random-steps", "64", "--learning-starts", "32", "--eval-episodes", "0"]
SHAPES = {  # script -> its arguments, and the steps of a rollout
    "ppo_continuous.py": (ON_POLICY, 128),
    "blpo_continuous.py": (ON_POLICY, 128),
    "blpo_continuous_ablations.py": (ON_POLICY, 128),
    "ppo_discrete.py": (ON_POLICY, 128),
    "blpo_discrete.py": (ON_POLICY, 128),
    "stac.py": (ON_POLICY[:4], 128),
    "stac_ablations.py": (ON_POLICY[:4], 128),
    "stddpg.py": (OFF_POLICY, 32),
    "stsac.py": (OFF_POLICY, 32),
}


class Finding(Exception):
    """What is wrong with a run, in one sentence."""


def require(true: bool, finding: str) -> None:
    """Raise Finding unless `true`."""
    if not true:
        raise Finding(finding)


def command(script: str, run_dir: Path) -> list[str]:
    """The arguments of a run of some seconds, with a checkpoint after every fifth rollout."""
    words, batch = SHAPES[script]
    task = "ClockDiscrete" if "discrete" in script else "Clock"
    words = [*words, "--env-id", f"toy_envs:toy/{task}-v0", "--total-timesteps", str(ITERATIONS * batch)]
    return [*words, "--checkpoint-every", "5", "--save-model", "--device", "cpu", "--run-dir", str(run_dir)]


def start(script: str, words: list[str]) -> subprocess.Popen:
    """The script in a process of its own, its output in a file that is read when it has ended."""
    environment = os.environ | {"PYTHONPATH": str(REPO / "tests"), "OMP_NUM_THREADS": "1"}
    output = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        [sys.executable, str(REPO / script), *words], env=environment, stdout=output, stderr=output, text=True
    )
    process.output = output
    return process


def printed(process: subprocess.Popen) -> str:
    """What an ended process has printed."""
    process.output.seek(0)
    return process.output.read()


def folder_in(run_dir: Path) -> Path | None:
    """The folder of the one run in `run_dir`, if there is one yet."""
    return next(iter(run_dir.iterdir()), None) if run_dir.is_dir() else None


def rows(path: Path) -> list[dict[str, str]]:
    """The complete lines of a csv file, without the columns that hold times; a kill may cut the last line short."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    header, *found = [*csv.reader(line for line in lines if line.endswith("\n"))] or [[]]
    for number, row in enumerate(found, 2):
        require(len(row) == len(header), f"line {number} of {path.name} has {len(row)} cells, the header {len(header)}")
    kept = [name for name in header if not name.startswith(("wall_time", "charts/SPS", "time/"))]
    return [{name: dict(zip(header, row))[name] for name in kept} for row in found]


def load(path: Path):
    """The content of a file of torch.save; a Finding if it does not load."""
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # a damaged archive raises errors of many kinds
        raise Finding(f"{path.name} does not load: {error}") from error


def read_json(path: Path) -> dict:
    """The content of a json file; a Finding if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Finding(f"{path.name} is damaged: {error}") from error


def equal(a, b) -> bool:
    """Whether two contents of torch.save are bitwise equal, but for times, on which the lengths of the csv files depend."""
    if isinstance(a, dict) and isinstance(b, dict):
        names, others = ({name for name in x if "time" not in str(name) and name != "csv_lengths"} for x in (a, b))
        return names == others and all(equal(a[name], b[name]) for name in names)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and a == b


def wait_for_rollout(process: subprocess.Popen, run_dir: Path) -> None:
    """Wait until the process has added a row to metrics.csv, or has ended."""

    def size() -> int:
        return sum(path.stat().st_size for path in run_dir.glob("*/metrics.csv"))

    lowest = size()
    while process.poll() is None and size() <= lowest:
        lowest = min(lowest, size())  # --resume first drops the rows after the checkpoint
        time.sleep(0.005)


def check_stopped(folder: Path, batch: int) -> bool:
    """Check the folder of a run that was stopped; returns whether it has a checkpoint to continue from."""
    read_json(folder / "args.json")
    if (folder / "result.json").exists():
        read_json(folder / "result.json")
    metrics = rows(folder / "metrics.csv")
    rows(folder / "episodes.csv")
    steps = [int(row["global_step"]) for row in metrics]
    require(steps == [batch * (i + 1) for i in range(len(steps))], f"metrics.csv has the steps {steps[:3]} ... {steps[-3:]}")
    if not (folder / "checkpoint.pt").exists():
        return False
    step = load(folder / "checkpoint.pt")["global_step"]
    require(step <= len(steps) * batch, f"the checkpoint counts {step} steps, metrics.csv ends at {len(steps) * batch}")
    return True


def check_signal(process: subprocess.Popen, folder: Path, number: int) -> None:
    """Check how a run ended that was sent SIGINT or SIGTERM."""
    result = folder / "result.json"
    status = read_json(result)["status"] if result.exists() else None
    require(status in (None, "interrupted"), f"after signal {number} the status is {status!r}")
    if process.returncode == 128 + number and status is not None:
        require((folder / "checkpoint.pt").exists(), f"after signal {number} there is no checkpoint")
        require("Traceback" not in printed(process), f"signal {number} was answered with a traceback")
    else:  # it came before the script could catch it
        early = process.returncode in (-number, 128 + number) or "KeyboardInterrupt" in printed(process)
        require(early, f"signal {number}: exit status {process.returncode}, {printed(process)[-500:]}")


def check_finished(folder: Path, alone: Path) -> None:
    """Check that a finished run equals the one that was left alone."""
    for name in ("metrics.csv", "episodes.csv"):
        require(rows(folder / name) == rows(alone / name), f"{name} is not that of the run left alone")
    for name in ("checkpoint.pt", "model.pt"):
        require(equal(load(folder / name), load(alone / name)), f"{name} is not that of the run left alone")
    result, expected = read_json(folder / "result.json"), read_json(alone / "result.json")
    for name in ("status", "global_step", "final_return"):
        require(result[name] == expected[name], f"{name} is {result[name]}, not {expected[name]}")
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.")}
    expected = {path.name for path in alone.iterdir() if not path.name.startswith("events.")}
    require(names == expected, f"files left over or missing: {sorted(names ^ expected)}")


def attack(script: str, place: Path, stops: list[int], chance: random.Random) -> dict[str, int]:
    """Stop runs of the script by these signals in turn. Returns how often what happened; raises Finding."""
    batch = SHAPES[script][1]
    began = time.monotonic()
    process = start(script, command(script, place / "alone"))
    while folder_in(place / "alone") is None and process.poll() is None:
        time.sleep(0.01)
    appeared = time.monotonic() - began
    require(process.wait() == 0, f"the run left alone failed: {printed(process)[-500:]}")
    ended = time.monotonic() - began
    alone = folder_in(place / "alone")
    count = dict.fromkeys(("kills", "signals", "uncaught signals", "finished runs"), 0)
    run_dir, remaining = place / "attacked", [*stops]
    while True:
        folder = folder_in(run_dir)
        words = command(script, run_dir) if folder is None else ["--resume", str(folder)]
        process = start(script, words)
        seconds = chance.triangular(0, ended - appeared, 0)  # mostly early, so that a run is stopped several times
        if chance.random() < 0.2:
            seconds = chance.uniform(0, appeared)  # while the script starts
        else:
            wait_for_rollout(process, run_dir)
        try:
            process.wait(seconds if remaining else 600)
        except subprocess.TimeoutExpired:
            process.send_signal(remaining[0] if remaining else signal.SIGKILL)
            process.wait(60)
        folder = folder_in(run_dir)
        result = folder / "result.json" if folder is not None else None
        if result is not None and result.exists() and read_json(result)["status"] == "finished":
            check_finished(folder, alone)  # it got to its end before the signal did
            shutil.rmtree(run_dir)
            count["finished runs"] += 1
            if not remaining:
                return count
            continue
        require(bool(remaining), f"the continued run failed, exit status {process.returncode}: {printed(process)[-500:]}")
        number = remaining[0]
        if number == signal.SIGKILL:
            require(process.returncode == -number, f"it failed before the kill: {printed(process)[-500:]}")
            count["kills"] += 1
        elif folder is not None:
            check_signal(process, folder, number)
            count["signals" if process.returncode == 128 + number else "uncaught signals"] += 1
        remaining.pop(0)
        if folder is not None and not ((folder / "args.json").exists() and check_stopped(folder, batch)):
            process = start(script, ["--resume", str(folder)])  # nothing to continue: one sentence, and a new run
            status = process.wait(60)
            said = printed(process)
            require(status == 2 and said.count("\n") == 1, f"without a checkpoint: exit status {status}, {said[-500:]}")
            shutil.rmtree(run_dir)


def main() -> int:
    """The exit status of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs in all, dealt out to the scripts")
    parser.add_argument("--signals", type=int, default=20, help="SIGINTs and SIGTERMs in all, half of each")
    parser.add_argument("--script", nargs="+", default=[*SHAPES], choices=[*SHAPES], metavar="SCRIPT", help=", ".join(SHAPES))
    parser.add_argument("--seed", type=int, default=None, help="seed of the moments; default: a new one, which is printed")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    chance = random.Random(seed)
    stops = [signal.SIGKILL] * args.kills + [(signal.SIGINT, signal.SIGTERM)[i % 2] for i in range(args.signals)]
    chance.shuffle(stops)
    place = Path(tempfile.mkdtemp(prefix="attack_"))
    findings = 0
    for index, script in enumerate(args.script):
        try:
            count = attack(script, place / script, stops[index :: len(args.script)], chance)
            print(f"{script}: " + ", ".join(f"{number} {what}" for what, number in count.items()), flush=True)
            shutil.rmtree(place / script)
        except Finding as finding:
            findings += 1
            print(f"{script}: {finding}: {place / script}", flush=True)
    print(f"{findings} findings" if findings else "nothing found")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
