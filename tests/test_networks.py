"""The fast parts of the networks against PyTorch's own: tanh, the policy in numpy, flat parameters, Adam."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

import ppo_continuous as ppo

DOUBLE = torch.float64


def with_torch_tanh(network: nn.Sequential) -> nn.Sequential:
    twin = copy.deepcopy(network)
    for i, layer in enumerate(twin):
        if isinstance(layer, ppo.Tanh):
            twin[i] = nn.Tanh()
    return twin


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (DOUBLE, 1e-14)])
def test_tanh_and_its_gradient_are_those_of_torch(dtype, tolerance):
    x = torch.cat([torch.linspace(-30, 30, 1001), torch.logspace(-30, 1, 200), torch.zeros(1)]).to(dtype)
    expected = torch.tanh(x)
    ours = x.clone().requires_grad_()
    y = ppo.Tanh()(ours * 1)  # the output of an operation, as in a network: it may be overwritten
    y.backward(torch.ones_like(y))
    assert (y - expected).abs().max() < tolerance
    assert (ours.grad - (1 - expected**2)).abs().max() < 2 * tolerance
    assert torch.all(y.abs() <= 1)


def test_tanh_has_second_derivatives():
    def through_tanh(x):
        return ppo.Tanh()(2 * x)

    x = torch.randn(7, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(through_tanh, x)
    assert torch.autograd.gradgradcheck(through_tanh, x)


def test_tanh_works_under_the_transforms_of_torch_func():
    network = ppo.mlp(5, 7, 1, 1.0).double()
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    obs = torch.randn(11, 5, dtype=DOUBLE)

    def value(parameters, network, one):
        return torch.func.functional_call(network, parameters, (one,)).squeeze(-1)

    per_row = torch.func.vmap(torch.func.grad(value), in_dims=(None, None, 0))
    ours, expected = per_row(parameters, network, obs), per_row(parameters, with_torch_tanh(network), obs)
    assert all(torch.allclose(ours[name], expected[name], atol=1e-14) for name in parameters)


def test_numpy_mlp_is_the_network():
    network = ppo.mlp(11, 64, 3, 0.5)
    obs = torch.randn(32, 11)
    expected = with_torch_tanh(network)(obs).detach().numpy()
    actual = ppo.numpy_mlp(network)(obs.numpy())
    assert actual.dtype == np.float32 and np.abs(actual - expected).max() < 1e-6


@pytest.mark.parametrize("sizes", [(11, 64, 3), (3, 2, 9)])
def test_flat_view_changes_no_value_and_carries_gradients_and_steps(sizes):
    """Wide and narrow weights: those that are taller than wide are stored transposed."""
    network = ppo.mlp(*sizes, 1.0).double()
    plain = copy.deepcopy(network)
    flat = ppo.flat_view(network.parameters())
    obs = torch.randn(20, sizes[0], dtype=DOUBLE)
    assert flat.numel() == sum(parameter.numel() for parameter in plain.parameters())
    assert torch.allclose(network(obs), plain(obs), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(ours, expected) for ours, expected in zip(network.parameters(), plain.parameters()))
    for _ in range(2):  # gradients accumulate
        network(obs).square().sum().backward()
        plain(obs).square().sum().backward()
    for ours, expected in zip(network.parameters(), plain.parameters()):
        assert torch.allclose(ours.grad, expected.grad, rtol=1e-12)
    assert torch.isclose(flat.grad.norm(), torch.cat([p.grad.flatten() for p in plain.parameters()]).norm())
    with torch.no_grad():
        flat -= 0.1 * flat.grad
        for parameter in plain.parameters():
            parameter -= 0.1 * parameter.grad
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(network.parameters(), plain.parameters()))
    flat.grad.zero_()
    assert all(parameter.grad.abs().sum() == 0 for parameter in network.parameters())


def test_a_state_dict_survives_the_flat_view():
    network, other = ppo.mlp(11, 8, 3, 1.0), ppo.mlp(11, 8, 3, 1.0)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    flat = ppo.flat_view(other.parameters())
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert torch.isclose(flat.norm(), torch.cat([value.flatten() for value in state.values()]).norm())


def test_adam_is_bitwise_that_of_torch_and_resumes():
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, n)) for n in (50, 30)] for _ in range(2))
    adam = ppo.FlatAdam({"params": ours[0], "lr": 0.01}, {"params": ours[1], "lr": 0.002})
    groups = [{"params": theirs[0], "lr": 0.01}, {"params": theirs[1], "lr": 0.002}]
    reference = torch.optim.Adam(groups, eps=1e-5, fused=True)
    for step in range(6):
        if step == 3:  # through a checkpoint
            state = copy.deepcopy(adam.state_dict())
            adam = ppo.FlatAdam({"params": ours[0], "lr": 1.0}, {"params": ours[1], "lr": 1.0})
            adam.load_state_dict(state)
        for each in (adam, reference):
            each.param_groups[0]["lr"] = 0.01 / (1 + step)
        for mine, other in zip(ours, theirs):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        adam.update()
        reference.step()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs))
    assert not torch.equal(ours[0], torch.linspace(-1, 1, 50))
