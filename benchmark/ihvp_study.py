"""Which directions and which damping: the residual of a rank-10 Nystrom solve on critics from real training.

    python -m benchmark.ihvp_study                                                prints the table
    python -m benchmark.ihvp_study --results-dir benchmark/results/ihvp_study     and writes residuals.csv, summary.md, study.json

It captures systems from three runs of 102,400 steps, then solves them all.

The rule, written before the numbers: among the dampings 100, 30, 10, 3, 1, 0.3, 0.1 take the smallest at which the
cheapest kind of directions leaves a relative residual |(H + damping I) v - b| / |b| below 0.3 in every captured system
(the median of 5 draws of its random directions; v = 0 scores 1). A smaller damping is nearer to the hypergradient of the undamped
follower. The runs train with `--ihvp exact`; their seed is used for nothing else.
"""

import csv
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro

import blpo_continuous as blpo
import blpo_continuous_ablations as laboratory
from benchmark.machine import provenance

RANK, DRAWS = 10, 5
DAMPINGS = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
COLUMNS = ("coordinates", "last-layer", "gaussian", "krylov", "features")


@dataclass
class Args:
    env_ids: tuple[str, ...] = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4")
    """tasks"""
    total_timesteps: int = 102_400
    """steps of each run, in [1, inf)"""
    iterations: tuple[int, ...] = (5, 15, 30, 50)
    """rollouts after which the last minibatch's system is taken"""
    seed: int = 900
    """seed of the runs and of the random directions, in [0, inf)"""
    results_dir: Path | None = None
    """folder for the csv, md and json files; default: nothing is written"""


def captured_systems(words: list[str], rollouts: Collection[int]) -> list[tuple[int, blpo.GaussNewton, torch.Tensor]]:
    """(rollout, curvature, u with b = J^T u) of the last minibatch of some rollouts of a real run with these words, on the CPU
    and with the exact solver, so that no approximation shapes the critics."""
    systems, solves, original = [], 0, blpo.exact_ihvp

    def keep(curvature, u, damping):
        nonlocal solves
        solves += 1
        if solves % per_rollout == 0 and solves // per_rollout in rollouts:
            systems.append((solves // per_rollout, curvature, u))
        return original(curvature, u, damping)

    with TemporaryDirectory() as folder:
        args = blpo.parse_args([*words, "--ihvp", "exact", "--device", "cpu", "--run-dir", folder])
        per_rollout = args.update_epochs * args.num_minibatches
        blpo.exact_ihvp = keep
        try:
            blpo.train(args)
        finally:
            blpo.exact_ihvp = original
    return systems


def residual(curvature: blpo.GaussNewton, b: torch.Tensor, v: torch.Tensor, damping: float) -> float:
    """|(H + damping I) v - b| / |b|."""
    return float((curvature.product(v) + damping * v - b).norm() / b.norm())


def main(args: Args) -> None:
    """Capture, solve, print; write if asked."""
    rows, worst, started = [], defaultdict(list), time.time()
    for env_id in args.env_ids:
        words = f"--env-id {env_id} --seed {args.seed} --total-timesteps {args.total_timesteps}".split()
        for iteration, curvature, u in captured_systems(words, args.iterations):
            kernel = curvature.jacobian.kernel() * curvature.root[:, None] * curvature.root
            top = float(torch.linalg.eigvalsh(kernel.double())[-1])
            for damping in DAMPINGS:
                b, v = blpo.exact_ihvp(curvature, u, damping)
                solved = {"exact": [v]} | {f"cg {k}": [blpo.cg_ihvp(curvature, u, damping, k)[1]] for k in (2, 5, 10)}
                for columns in COLUMNS:
                    solved[columns] = []
                    for draw in range(DRAWS):
                        generator = torch.Generator().manual_seed(args.seed + draw)
                        p = laboratory.nystrom_directions(columns, curvature, b, RANK, generator)
                        products = laboratory.curvature_products(curvature, p)
                        solved[columns].append(blpo.nystrom_solve(products, p @ products.T, damping, b))
                z = curvature.jacobian.jvp(solved["exact"][0])[curvature.root > 0]
                for solver, solutions in solved.items():
                    value = statistics.median(residual(curvature, b, v, damping) for v in solutions)
                    worst[solver, damping].append(value)
                    rows.append({
                        "env_id": env_id, "iteration": iteration, "top_eigenvalue": round(top, 3), "damping": damping,
                        "solver": solver, "residual": f"{value:.4g}", "exact_z_mean": f"{z.mean():.4g}",
                        "exact_z_std": f"{z.std():.4g}",
                    })  # fmt: skip
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    count = len(worst[solvers[0], DAMPINGS[0]])
    lines = [f"Largest residual over {count} systems (median over {DRAWS} draws of directions), rank {RANK}.", ""]
    lines += ["| damping | " + " | ".join(solvers) + " |", "|---" * (len(solvers) + 1) + "|"]
    lines += [
        f"| {damping:g} | " + " | ".join(f"{max(worst[solver, damping]):.2g}" for solver in solvers) + " |" for damping in DAMPINGS
    ]
    print("\n".join(lines))
    if args.results_dir is None:
        return
    args.results_dir.mkdir(parents=True, exist_ok=True)
    with open(args.results_dir / "residuals.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    (args.results_dir / "summary.md").write_text("\n".join(lines) + "\n")
    made_by = provenance() | {"script": "benchmark/ihvp_study.py"}
    made_by |= {"command": " ".join(["python", "-m", "benchmark.ihvp_study", *sys.argv[1:]])}
    made_by |= {"seed": args.seed, "seconds": round(time.time() - started)}
    (args.results_dir / "study.json").write_text(json.dumps(made_by, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
