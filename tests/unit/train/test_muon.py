"""Our Muon against PyTorch's, and the property that makes it Muon."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import train.muon
from train.muon import Muon, MuonAdam, orthogonalised

SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8)]


def matrices(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (16, 48), (48, 16)])
def test_singular_values_become_about_one(rows: int, columns: int) -> None:
    given = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalised(given))
    assert ((values > 0.3) & (values < 1.3)).all()
    assert values.median() > 0.6


@pytest.mark.parametrize("bf16", [False, True])
def test_updates_are_those_of_torch(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.muon, "has_bf16", lambda: bf16)
    ours, theirs = matrices(0), matrices(0)
    mine = Muon(ours, lr=0.02, weight_decay=0.01)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for a, b, gradient in zip(ours, theirs, matrices(10 + step), strict=True):
            a.grad, b.grad = gradient.detach().clone(), gradient.detach().clone()
        mine.step()
        reference.step()
    for a, b, start in zip(ours, theirs, matrices(0), strict=True):
        assert (a - b).norm() < 0.05 * (b - start).norm()  # theirs rounds to bfloat16
    mine.load_state_dict(reference.state_dict())


def test_matrices_without_a_gradient_stay() -> None:
    some = matrices(0)
    some[1].grad = torch.ones_like(some[1])
    before = [matrix.detach().clone() for matrix in some]
    Muon(some, lr=0.1, weight_decay=0.01).step()
    assert [torch.equal(a, b) for a, b in zip(some, before, strict=True)] == [
        True, False, True, True
    ]  # fmt: skip


def test_a_saved_optimizer_goes_on_as_it_would_have() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)]), "head": nn.Linear(4, 2)})

    def give_gradients(model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    first, second = network(), network()
    one = MuonAdam(first, 0.02, 0.01)
    give_gradients(first, 1)
    one.step(1.0)
    second.load_state_dict(first.state_dict())
    other = MuonAdam(second, 0.02, 0.01)
    other.load(copy.deepcopy(one.state()))
    for model, optimizer in ((first, one), (second, other)):
        give_gradients(model, 2)
        optimizer.step(0.5)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
