"""The scripts on a CUDA device: the same numbers as on the CPU, bitwise repetition, resume, the graphs of steps and updates. Skipped without one.

All noise and all minibatches are drawn on the CPU, so the first update of a run has the same data on both devices.
"""

import math
import os
import shutil
import signal

import pytest
import test_atari
import test_off_policy
import test_sobirl_rlhf
import test_stac
import torch
from conftest import after_iteration, for_actions, load, read_csv, resume, train, without_time
from torch import nn

import blpo_atari as blpo
import ppo_atari as ppo
import stac_ablations

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
few_channels = test_atari.few_channels

RUNS = {
    **{name: lambda name=name, **changes: train(name, **changes) for name in ("ppo_continuous.py", "ppo_discrete.py")},
    **{
        f"{name[:-3]} {ihvp}": lambda name=name, ihvp=ihvp, **changes: train(name, ihvp=ihvp, **changes)
        for name, ihvp in [("blpo_continuous.py", "nystrom"), ("blpo_continuous.py", "cg"), ("blpo_discrete.py", "exact")]
    },
    **{
        f"ppo_atari {separate}": lambda separate=separate, **changes: test_atari.train("ppo_atari.py", separate_trunks=separate, **changes)
        for separate in (False, True)
    },
    **{
        f"blpo_atari {follower} {ihvp}": lambda follower=follower, ihvp=ihvp, **changes: test_atari.train(
            "blpo_atari.py", follower=follower, ihvp=ihvp, **changes
        )
        for follower, ihvp in [("head", "nystrom"), ("last-two", "nystrom"), ("full", "cg")]
    },
    "blpo_continuous_ablations": lambda **changes: train("blpo_continuous_ablations.py", **changes),
    "stac": lambda **changes: test_stac.train(**changes),
    "stac_ablations": lambda **changes: test_stac.train(stac_ablations, **changes),
    **{
        f"{name} {leader}": lambda name=name, leader=leader, **changes: test_off_policy.train(f"{name}.py", leader=leader, **changes)
        for name in ("stddpg", "stsac")
        for leader in ("actor", "critic", "none-sequential")
    },
    **{
        f"sobirl_rlhf {way}": lambda way=way, **changes: test_sobirl_rlhf.train(**test_sobirl_rlhf.WAYS[way] | changes)
        for way in ("sobirl", "sobirl rollouts", "drlhf", "pbrl", "ground-truth")
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def full_precision():
    """Convolutions in all of float32, so that devices can be compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def numbers(folder) -> list[dict[str, float]]:
    """What each iteration of a run logged of its losses and of its hypergradient."""
    rows = without_time(read_csv(folder / "metrics.csv"))
    kept = ("losses/", "bilevel/", "reward/")
    return [{name: float(x) for name, x in row.items() if name.startswith(kept) and x not in ("", "nan")} for row in rows]


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_repeats_bitwise_and_its_first_update_is_that_of_the_cpu(tmp_path, kind):
    if kind.endswith("rollouts"):
        pytest.importorskip("mujoco")
    first, second, third = (
        numbers(RUNS[kind](run_dir=tmp_path / str(index), device=device)) for index, device in enumerate(["cuda", "cuda", "cpu"])
    )
    assert first == second
    begun = next(index for index, row in enumerate(third) if row)  # an off-policy run begins with random steps
    assert first[begun].keys() == third[begun].keys() and any(value != 0 for value in third[begun].values())
    for name, value in third[begun].items():
        assert first[begun][name] == pytest.approx(value, rel=0.02, abs=2e-4), name


GRAPHED = [f"{name} {leader}" for name in ("stddpg", "stsac") for leader in ("actor", "none-sequential")]
GRAPHED += [f"sobirl_rlhf {way}" for way in ("sobirl", "drlhf", "ground-truth")]


@pytest.mark.parametrize("kind", GRAPHED)
def test_a_run_with_its_update_as_a_graph_is_the_run_that_launches_every_kernel(tmp_path, monkeypatch, kind):
    module = load(f"{kind.split()[0]}.py")
    graphs, original = [], module.GraphedUpdate

    def graphed(update):
        graphs.append(original(update))
        return graphs[-1]

    found = []
    for each in (graphed, lambda update: update):
        monkeypatch.setattr(module, "GraphedUpdate", each)
        found.append(numbers(RUNS[kind](run_dir=tmp_path / str(len(found)), device="cuda")))
    assert graphs and all(each.graph is not None and each.calls > 10 for each in graphs)
    assert len(found[0]) == len(found[1]) > 1 and any(found[0])
    for one, other in zip(*found):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("kind", ["stddpg actor", "sobirl_rlhf sobirl"])
def test_conjugate_gradient_and_the_policy_term_of_pbrl_have_no_graph(tmp_path, monkeypatch, kind):
    """The one waits for the device, the other has pairs of any number."""
    module = load(f"{kind.split()[0]}.py")
    monkeypatch.setattr(module, "GraphedUpdate", None)
    changes = {"ihvp": "cg"} if kind.startswith("stddpg") else {"reward_update": "pbrl-style", "rollout_length": 3}
    assert any(numbers(RUNS[kind](run_dir=tmp_path, device="cuda", **changes)))


@pytest.mark.parametrize("kind", GRAPHED)
def test_no_cuda_graphs(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(load(f"{kind.split()[0]}.py"), "GraphedUpdate", None)
    assert any(numbers(RUNS[kind](run_dir=tmp_path, device="cuda", cuda_graphs=False)))


@pytest.mark.parametrize("kind", ["stddpg actor", "stsac actor", "sobirl_rlhf sobirl"])
def test_an_interrupted_run_with_a_graph_goes_on(tmp_path, monkeypatch, kind):
    def fail():
        raise RuntimeError("pulled the plug")

    script = f"{kind.split()[0]}.py"
    module, graphs, original, found = load(script), [], load(script).GraphedUpdate, []
    whole = numbers(RUNS[kind](run_dir=tmp_path / "whole", device="cuda"))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        after_iteration(patch, script, 3, fail)
        RUNS[kind](run_dir=tmp_path / "cut", device="cuda")
    (cut,) = (tmp_path / "cut").iterdir()
    copy = shutil.copytree(cut, tmp_path / "copy")

    def graphed(update):
        graphs.append(original(update))
        return graphs[-1]

    for folder, each in ((cut, graphed), (copy, lambda update: update)):  # with a graph, and launching every kernel
        monkeypatch.setattr(module, "GraphedUpdate", each)
        resume(script, folder)
        found.append(numbers(folder))
    assert graphs and all(each.graph is not None for each in graphs)
    assert len(found[0]) == len(found[1]) == len(whole) == 4 and found[0][:2] == found[1][:2] == whole[:2]
    for one, other in zip(*found):
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("script", ["ppo_continuous.py", "blpo_discrete.py"])
def test_an_interrupted_on_policy_run_goes_on_bitwise(tmp_path, monkeypatch, script):
    """In a task with nothing to remember; the CPU's generator is all that is saved, because it draws every number."""
    task = for_actions(script, "toy_envs:toy/Clock-v0")
    whole = train(script, run_dir=tmp_path / "whole", device="cuda", env_id=task)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        after_iteration(patch, script, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(script, run_dir=tmp_path / "cut", device="cuda", env_id=task)
    (cut,) = (tmp_path / "cut").iterdir()
    resume(script, cut)
    assert numbers(cut) == numbers(whole) and len(numbers(cut)) == 6


@pytest.mark.parametrize("script", test_atari.SCRIPTS)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_an_interrupted_run_goes_on_here_or_on_a_cpu(tmp_path, monkeypatch, script, device):
    def fail():
        raise RuntimeError("pulled the plug")

    whole = numbers(test_atari.train(script, run_dir=tmp_path / "whole", device="cuda"))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        after_iteration(patch, script, 2, fail)
        test_atari.train(script, run_dir=tmp_path / "cut", device="cuda")
    (cut,) = (tmp_path / "cut").iterdir()
    test_atari.resume(script, cut, "--device", device)
    went_on = numbers(cut)
    assert len(went_on) == len(whole) == 4 and went_on[0] == whole[0]
    assert all(math.isfinite(value) for row in went_on for value in row.values())


@pytest.mark.parametrize("name", ["head", "last-two", "full"])
@pytest.mark.parametrize("solver", ["nystrom", "cg"])
def test_hypergradients_are_those_of_the_cpu_in_double_precision(name, solver):
    torch.manual_seed(0)
    agent = blpo.Agent(4, separate_trunks=True)
    below, follower = blpo.split_critic(agent, name)
    images = blpo.pixels(torch.randint(0, 256, (20, 4, 84, 84), dtype=torch.uint8))
    u, weights = torch.randn(20), torch.full((20,), 1 / 20)
    found = []
    for device, dtype in [("cpu", torch.float64), ("cuda", torch.float32)]:
        for part in (below, follower):
            part.to(device, dtype)
        inputs = below(images.to(device, dtype)).detach()
        curvature = blpo.GaussNewton(blpo.CriticJacobian(follower, inputs), weights.to(device, dtype))
        generator = torch.Generator().manual_seed(1)
        solve = {
            "nystrom": lambda curvature, u: blpo.nystrom_ihvp(curvature, u, 1.0, 4, generator),
            "cg": lambda curvature, u: blpo.cg_ihvp(curvature, u, 1.0, 5),
        }[solver]  # fmt: skip
        b, v = solve(curvature, u.to(device, dtype))
        found.append([b, v, curvature.jacobian.jvp(v)])
    # Of random images the features are nearly alike; float32 drops directions of the Nystrom core that float64 keeps, also
    # on the CPU (0.8 % for all layers).
    tolerance = 2e-2 if solver == "nystrom" else 1e-3
    for expected, got in zip(*found):
        assert (got.cpu().double() - expected).norm() < tolerance * expected.norm()


def test_parameters_are_where_the_networks_live(tmp_path):
    agent = ppo.Agent(4, False).to(torch.device("cuda"), memory_format=torch.channels_last)
    assert {parameter.device.type for parameter in agent.parameters()} == {"cuda"}
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in agent.actor_trunk if isinstance(layer, nn.Conv2d))
