"""How long an update of `stddpg.py` and `stsac.py` takes, by leader and solver, against the plain update.

    python -m benchmark.studies.speed_stackelberg                  a few minutes on an idle core
    python -m benchmark.studies.speed_stackelberg --device cuda    with the networks on a GPU

The reference is `--leader none-sequential` of the same script: DDPG or SAC as usual, with the same networks
(256-256), batch (100) and optimiser. The training is timed as it is (benchmark/studies/turns.py says how);
columns `update` have minibatches, both players' steps, targets and diagnostics (one update of an iteration),
not the environments; columns `time` have everything. A turn is an iteration of --num-steps updates.

The rows "10 iterations" make exactly ten: no guard and no tolerance ends the solve earlier (lambda = 500
keeps the matrix positive definite). The rows "lambda = 0" are the paper's setting, in which the guard may
end a solve.

With `--device cuda` the environments stay on the CPU, and the updates are CUDA graphs but for those with
conjugate gradients, which cannot be captured. Two more rows have a graph's updates launched kernel by
kernel.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal, get_args

from benchmark.studies import study, turns

Script = Literal["stddpg.py", "stsac.py"]
REFERENCE = "none-sequential"
COMPETITORS = {  # name -> words
    REFERENCE: "--leader none-sequential",
    "none-simultaneous": "--leader none-simultaneous",
    "actor, kernel": "--leader actor --ihvp kernel",
    "actor, cg, 10 iterations": "--leader actor --ihvp cg --regularisation 500",
    "actor, cg, lambda = 0": "--leader actor --ihvp cg --regularisation 0",
    "critic, cg, 10 iterations": "--leader critic --regularisation 500",
    "critic, cg, lambda = 0": "--leader critic --regularisation 0",
}


class Args(study.Args):
    """What is measured."""

    env_id: str = "HalfCheetah-v4"
    """environment; its episodes never end early, so each of its steps has one update"""
    scripts: Annotated[tuple[Script, ...], study.AT_LEAST_ONE] = get_args(Script)
    """whose updates to measure"""
    rounds: study.Count = 9
    """turns of each competitor"""
    num_steps: study.Count = 250
    """updates in a turn"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks live"""


def all_iterations(script) -> None:
    """Let the script's conjugate gradient make every iteration."""
    script.conjugate_gradient = partial(script.conjugate_gradient, tolerance=0.0)


def measure(args: Args) -> Iterator[tuple[str, list[study.Row]]]:
    """A row for each script and kind of update."""
    rows: list[study.Row] = []
    words = f"--env-id {args.env_id} --device {args.device} --env-threads 1 --eval-episodes 0"
    words += (
        f" --learning-starts 0 --num-steps {args.num_steps} --update-every {math.gcd(50, args.num_steps)}"
    )
    words += f" --total-timesteps {(args.rounds + 2) * args.num_steps}"
    competitors = dict(COMPETITORS)
    if args.device == "cuda":
        for name in (REFERENCE, "actor, kernel"):
            competitors[f"{name}, every kernel launched"] = f"{COMPETITORS[name]} --no-cuda-graphs"
    for script in dict.fromkeys(args.scripts):
        loops = {}
        for name, more in competitors.items():
            prepared = {"prepare": all_iterations} if "10 iterations" in name else {}
            loops[name] = partial(turns.script_loop, script, f"{words} {more}", **prepared)
        samples = turns.loops_in_turns(loops, args.rounds)
        rows += turns.loop_rows(samples, lambda _: {"plain": REFERENCE}, env_id=args.env_id, script=script)
    yield "speed_stackelberg", rows


if __name__ == "__main__":
    study.command(Args, measure, __file__, __doc__)
