"""How long an update of `stddpg.py` and `stsac.py` takes, by leader and solver, against the same script's plain update.

    python -m benchmark.speed_stackelberg                                                 a few minutes on an idle core
    python -m benchmark.speed_stackelberg --results-dir benchmark/results/speed_stackelberg      and writes its files
    python -m benchmark.speed_stackelberg --device cuda                                   with the networks on a GPU

The reference is `--leader none-sequential` of the same script: DDPG or SAC as usual, with the same networks (256-256),
batch (100) and optimiser (fused Adam). What is timed is the training as it is: the
column time/update of metrics.csv, minibatches, both players' steps, targets and diagnostics (one update of an iteration)
included, environments and evaluation not. The column `loop` has the whole iteration, environments and logging included.

How the numbers are taken. On the CPU with one torch thread. Every competitor trains in a process of its own that sleeps
when it is not its turn; they take turns of one iteration (--num-steps updates each), A B C A B C ..., after one that does
not count, so that a change of the machine's load meets all alike. A number is the median over the turns with
(lowest..highest), and a ratio is taken within a turn before its median. The load average is printed and kept, because a
busy machine spoils all of them; ratios suffer less than milliseconds. The rows "10 iterations" make exactly ten: no guard
and no tolerance ends the solve earlier (lambda = 500 keeps the matrix positive definite). The rows "lambda = 0" are the
paper's setting, in which the guard may end a solve earlier.

With `--device cuda` the environments stay on the CPU, and the updates are CUDA graphs but for those with conjugate gradients,
which cannot be captured, since their guard decides on the CPU. Two more rows have a graph's updates launched kernel by kernel.

Writes speed_stackelberg.csv and speed_stackelberg.json (all samples, command, commit, versions, load).
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

import stddpg
import stsac
from benchmark.turns import loops_in_turns, provenance_of, ratios, script_loop, show, write_csv

REFERENCE = "none-sequential"
COMPETITORS = {  # name -> (words, whether conjugate gradient makes all its iterations)
    REFERENCE: ("--leader none-sequential", False),
    "none-simultaneous": ("--leader none-simultaneous", False),
    "actor, kernel": ("--leader actor --ihvp kernel", False),
    "actor, cg, 10 iterations": ("--leader actor --ihvp cg --regularisation 500", True),
    "actor, cg, lambda = 0": ("--leader actor --ihvp cg --regularisation 0", False),
    "critic, cg, 10 iterations": ("--leader critic --regularisation 500", True),
    "critic, cg, lambda = 0": ("--leader critic --regularisation 0", False),
}
LAUNCHED = ", every kernel launched"  # the same on CUDA without its graph
TARGETS = {  # ratio to the reference that is aimed at
    "stddpg.py": {"actor, kernel": 2.0, "actor, cg, 10 iterations": 7.5, "critic, cg, 10 iterations": 9.0},
    "stsac.py": {"actor, kernel": 2.0, "actor, cg, 10 iterations": 9.0, "critic, cg, 10 iterations": 9.0},
}


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    """environment; its episodes never end early, so each of its steps has one update"""
    scripts: tuple[str, ...] = ("stddpg.py", "stsac.py")
    """whose updates to measure"""
    rounds: int = 9
    """turns of each competitor, in [1, inf)"""
    num_steps: int = 250
    """updates in a turn, in [1, inf)"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks live"""
    results_dir: Path | None = None
    """folder for the csv and json files; default: nothing is written"""


def all_iterations(script) -> None:
    """Let the script's conjugate gradient make every iteration."""
    script.conjugate_gradient = partial(script.conjugate_gradient, tolerance=0.0)


def competitor(
    script, words: list[str], all_of_them: bool, rollout_done: Callable[[dict[str, float]], None]
) -> None:
    """The training with these words, for `loops_in_turns`."""
    if all_of_them:
        all_iterations(script)
    script_loop(script, words, rollout_done)


def measure(script, args: Args) -> dict[str, list[dict[str, float]]]:
    """Seconds of an iteration of each competitor, for each turn."""
    with tempfile.TemporaryDirectory() as runs:
        common = f"--env-id {args.env_id} --device {args.device} --env-threads 1 --run-dir {runs} --eval-episodes 0"
        common += f" --num-steps {args.num_steps} --update-every {math.gcd(50, args.num_steps)}"
        common += f" --learning-starts 0 --total-timesteps {(args.rounds + 2) * args.num_steps}"
        competitors = dict(COMPETITORS)
        if args.device == "cuda":
            for name in (REFERENCE, "actor, kernel"):
                competitors[name + LAUNCHED] = COMPETITORS[name][0] + " --no-cuda-graphs", False
        loops = {
            name: partial(competitor, script, [*common.split(), *words.split()], all_of_them)
            for name, (words, all_of_them) in competitors.items()
        }
        return loops_in_turns(loops, args.rounds, 1)


def main(args: Args) -> None:
    """Measure, print, and write if asked."""
    made_by, load, rows = provenance_of("speed_stackelberg"), [os.getloadavg()[0]], []
    if args.device == "cuda" and made_by["gpu"] is None:
        sys.exit("error: --device cuda: PyTorch finds no CUDA device here; use --device cpu")
    for name in args.scripts:
        seconds = measure({"stddpg.py": stddpg, "stsac.py": stsac}[name], args)
        load.append(os.getloadavg()[0])
        update, loop = ({key: [turn[part] for turn in turns] for key, turns in seconds.items()} for part in ("update", "rollout"))
        rows += [
            {
                "script": name,
                "update": key,
                "ms": [1e3 * each / args.num_steps for each in update[key]],
                "ratio": ratios(update[key], update[REFERENCE]),
                "target": str(TARGETS[name].get(key, "-")),
                "loop": ratios(loop[key], loop[REFERENCE]),
            }
            for key in seconds
        ]
    title = f"{args.env_id}, networks on {made_by['gpu'] if args.device == 'cuda' else 'the CPU'}, {args.rounds} turns of {args.num_steps} updates, load average {load[0]:.1f} to {load[-1]:.1f}"
    show(title, rows)
    if args.results_dir is not None:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        write_csv(args.results_dir / "speed_stackelberg.csv", rows)
        content = {"provenance": made_by | {"load_average": load}, "rows": rows}
        (args.results_dir / "speed_stackelberg.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
