"""Which directions and which damping: the residual of a rank-10 Nystrom solve on critics from real training.

    python -m benchmark.studies.ihvp_study --results-dir benchmark/results/ihvp_study      four minutes

It captures systems from three runs of 102,400 steps, solves them all, and prints the largest residuals.

The rule, written before the numbers: among the dampings 100, 30, 10, 3, 1, 0.3, 0.1 take the smallest at
which the cheapest kind of directions leaves a relative residual |(H + damping I) v - b| / |b| below 0.3 in
every captured system (the median of 5 draws of its random directions; v = 0 scores 1). A smaller damping is
nearer to the hypergradient of the undamped follower. The runs train with 50 steps of conjugate gradients;
their seed is used nowhere else. Systems are those of a whole rollout.
"""

import statistics
from collections.abc import Collection, Iterator
from tempfile import TemporaryDirectory
from typing import Annotated

import pandas as pd
import torch

import blpo_continuous as blpo
import blpo_continuous_ablations as laboratory
from benchmark.studies import study

System = tuple[int, blpo.GaussNewton, torch.Tensor]  # rollout, curvature, u with b = J^T u
RANK, DRAWS = 10, 5
DAMPINGS = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
COLUMNS = ("coordinates", "last-layer", "gaussian", "krylov", "features")


class Args(study.Args):
    """The runs."""

    env_ids: Annotated[tuple[str, ...], study.AT_LEAST_ONE] = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4")
    """tasks"""
    total_timesteps: study.Count = 102_400
    """steps of each run"""
    iterations: Annotated[tuple[study.Count, ...], study.AT_LEAST_ONE] = (5, 15, 30, 50)
    """rollouts after which the last epoch's system is taken"""
    seed: study.Seed = 900
    """seed of the runs and of the random directions"""


def captured_systems(words: list[str], rollouts: Collection[int]) -> list[System]:
    """The systems of the last epoch of some rollouts of a real run with these words, on the CPU and solved
    almost exactly, so that no approximation shapes the policies. Raises BadInput."""
    systems, solves, original = [], 0, blpo.cg_ihvp

    def keep(curvature, u, damping, iterations):
        nonlocal solves
        solves += 1
        if solves % per_rollout == 0 and solves // per_rollout in rollouts:
            systems.append((solves // per_rollout, curvature, u))
        return original(curvature, u, damping, iterations)

    with TemporaryDirectory() as folder:
        more = "--ihvp cg --cg-iterations 50 --device cpu --run-dir".split()
        args = blpo.parse_args([*words, *more, folder])
        per_rollout = args.update_epochs
        made = args.total_timesteps // (args.num_envs * args.num_steps)
        if max(rollouts) > made:
            raise study.BadInput(f"--iterations {max(rollouts)}: the run has {made} rollouts; ask for more")
        blpo.cg_ihvp = keep
        try:
            blpo.train(args)
        finally:
            blpo.cg_ihvp = original
    return systems


def residual(curvature: blpo.GaussNewton, b: torch.Tensor, v: torch.Tensor, damping: float) -> float:
    """|(H + damping I) v - b| / |b|."""
    return float((curvature.product(v) + damping * v - b).norm() / b.norm())


def measure(args: Args) -> Iterator[tuple[str, list[study.Row]]]:
    """A row for each system, damping and solver; the residual is a median over draws of directions."""
    rows: list[study.Row] = []
    for env_id in args.env_ids:
        words = f"--env-id {env_id} --seed {args.seed} --total-timesteps {args.total_timesteps}".split()
        for iteration, curvature, u in captured_systems(words, args.iterations):
            kernel = laboratory.kernel(curvature.jacobian) * curvature.root[:, None] * curvature.root
            labels = {"env_id": env_id, "iteration": iteration}
            labels["top_eigenvalue"] = float(torch.linalg.eigvalsh(kernel.double())[-1])
            for damping in DAMPINGS:
                b, v = laboratory.exact_ihvp(curvature, u, damping)
                solved = {"exact": [v]}
                solved |= {f"cg {k}": [blpo.cg_ihvp(curvature, u, damping, k)[1]] for k in (2, 5, 10)}
                for columns in COLUMNS:
                    solved[columns] = []
                    for draw in range(DRAWS):
                        generator = torch.Generator().manual_seed(args.seed + draw)
                        p = laboratory.nystrom_directions(columns, curvature, b, RANK, generator)
                        products = laboratory.curvature_products(curvature, p)
                        solved[columns].append(blpo.nystrom_solve(products, p @ products.T, damping, b))
                z = curvature.jacobian.jvp(v)[curvature.root > 0]
                means = {"exact_z_mean": float(z.mean()), "exact_z_std": float(z.std())}
                for solver, solutions in solved.items():
                    left = statistics.median(residual(curvature, b, v, damping) for v in solutions)
                    rows.append(labels | {"damping": damping, "solver": solver, "residual": left} | means)
    yield "residuals", rows
    words = {"index": "damping", "columns": "solver", "values": "residual", "aggfunc": "max", "sort": False}
    yield "largest", pd.DataFrame(rows).pivot_table(**words).reset_index().to_dict("records")


if __name__ == "__main__":
    study.command(Args, measure, __file__, __doc__)
