"""The changes that docs/your_project.md shows, each made to a copy of blpo_continuous.py."""

import importlib.util
import re

import pytest
import torch
from conftest import REPO
from test_hypergradient import check_against_autograd, updates_of
from test_networks import dense_jacobian, some_critic

PAGE = (REPO / "docs" / "your_project.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def block(word: str) -> str:
    """The one block of the page with this word in it."""
    (found,) = [text for text in BLOCKS if word in text]
    return found


def changed(tmp_path, change):
    """The script, changed by a function of its text, as a module."""
    path = tmp_path / "my_blpo.py"
    path.write_text(change((REPO / "blpo_continuous.py").read_text()))
    spec = importlib.util.spec_from_file_location("my_blpo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replaced(text: str, name: str, new: str) -> str:
    """The text with the top-level function of that name replaced."""
    old = re.search(rf"^def {name}\(.*?(?=^(?:def|class|#) ?)", text, re.DOTALL | re.MULTILINE).group()
    return text.replace(old, new.rstrip() + "\n\n\n")


def test_the_network(tmp_path, monkeypatch):
    old = r"        hidden = \[.*?\n        self\.critic = [^\n]*\n"
    new = "".join("        " + line + "\n" for line in block("LayerNorm").splitlines())
    script = changed(tmp_path, lambda text: re.sub(old, lambda _: new, text, count=1, flags=re.DOTALL))
    assert isinstance(script.Agent(3, 2).critic[1], torch.nn.LayerNorm)
    for seen in updates_of(script, tmp_path, monkeypatch, ihvp="cg", cg_iterations=50):
        check_against_autograd(seen)


@pytest.mark.parametrize("damping", [0.3, 3.0])
def test_the_solver(tmp_path, damping):
    script = changed(tmp_path, lambda text: text.replace("def cg_ihvp(", block("neumann_ihvp") + "\n\ndef cg_ihvp("))
    critic, obs = some_critic("tanh"), torch.randn(30, 5, dtype=torch.float64)
    weights = torch.full((30,), 1 / 30, dtype=torch.float64)
    curvature = script.GaussNewton(script.CriticJacobian(critic, obs), weights)
    u, dense = torch.randn(30, dtype=torch.float64), dense_jacobian(critic, obs)
    matrix = 2 * dense.T @ dense / 30 + damping * torch.eye(dense.shape[1], dtype=torch.float64)
    errors = []
    for terms in (1, 30, 3000):
        b, v = script.neumann_ihvp(curvature, u, damping, terms)
        torch.testing.assert_close(b, u @ dense, rtol=1e-10, atol=1e-12)
        errors.append(float((v - torch.linalg.solve(matrix, b)).norm() / b.norm()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-10


def test_the_leaders_objective(tmp_path, monkeypatch):
    """The oracle has PPO's clipping, so its range is made so wide that nothing is clipped; the script ignores it."""
    new = block("no clipping").split("\n\n\n")

    def change(text):
        for name, function in zip(("clipped_surrogate", "surrogate_slope"), new):
            assert f"def {name}(" in function
            text = replaced(text, name, function)
        return text

    script = changed(tmp_path, change)
    assert torch.equal(script.clipped_surrogate(torch.tensor([3.0]), torch.tensor([2.0]), 0.2), torch.tensor([6.0]))
    for seen in updates_of(script, tmp_path, monkeypatch, ihvp="cg", cg_iterations=50, learning_rate=3e-2):
        seen.args = seen.args.model_copy(update={"clip_coef": 1e9})
        assert check_against_autograd(seen).clipped == 0
