"""Rounding by the covariance of inputs: what it gains, and that it stays within its steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from export.gptq import WIDEST, observe, round_compensated
from export.quantize import FP8, LEVELS, Choice, quantize_weight


def inputs(count: int, channels: int, rank: int, seed: int) -> Tensor:
    """[count, channels], mostly of `rank` dimensions, as inputs of layers are."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn((count, rank), generator=draw) @ torch.randn(
        (rank, channels), generator=draw
    )
    return mixed + 0.1 * torch.randn((count, channels), generator=draw)


def error(x: Tensor, weight: Tensor, covariance: Tensor | None) -> float:
    """Relative L2 of products with the rounded weight."""
    values, scale = quantize_weight(weight, covariance=covariance)
    exact = x @ weight
    return float((x @ (values.float() * scale) - exact).norm() / exact.norm())


@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 9), st.integers(1, 12))
def test_steps_are_whole_and_within_their_range(seed, channels, outputs, rank) -> None:
    weight = torch.randn((channels, outputs), generator=torch.Generator().manual_seed(seed))
    covariance = observe(None, inputs(50, channels, rank, seed))
    assert covariance is not None
    scale = weight.abs().amax(dim=0) / LEVELS
    steps = round_compensated(weight, scale, covariance, LEVELS)
    assert torch.equal(steps, steps.round()) and steps.abs().max() <= LEVELS


@pytest.mark.parametrize("channels", [48, 300])  # within one stretch of rows, and beyond
def test_products_with_inputs_like_those_seen_come_out_nearer(channels: int) -> None:
    weight = torch.randn((channels, 20), generator=torch.Generator().manual_seed(1))
    seen, other = inputs(4000, channels, 12, 2).split(2000)
    nearest, compensated = error(other, weight, None), error(other, weight, observe(None, seen))
    assert compensated < nearest / 2


def test_independent_inputs_are_rounded_to_the_nearest() -> None:
    weight = torch.randn((40, 8), generator=torch.Generator().manual_seed(0))
    values, _ = quantize_weight(weight)
    compensated, _ = quantize_weight(weight, covariance=torch.eye(40) * 7)
    assert torch.equal(values, compensated)


def test_the_result_does_not_depend_on_what_stands_beside() -> None:
    weight = torch.randn((40, 8), generator=torch.Generator().manual_seed(0))
    covariance = observe(None, inputs(400, 40, 6, 0))
    whole, _ = quantize_weight(weight, covariance=covariance)
    halves = [quantize_weight(part, covariance=covariance)[0] for part in weight.split(4, dim=1)]
    assert torch.equal(whole, torch.cat(halves, dim=1))


def test_inputs_that_never_come_are_no_obstacle() -> None:
    x = inputs(100, 30, 5, 0)
    x[:, 7] = 0
    values, _ = quantize_weight(torch.ones(30, 2), covariance=observe(None, x))
    assert values.abs().max() <= LEVELS
    assert quantize_weight(torch.ones(30, 2), covariance=torch.zeros(30, 30))[0].eq(LEVELS).all()


def test_a_divisor_moves_from_inputs_into_weights_and_their_covariance() -> None:
    x, divisor = inputs(2000, 40, 6, 0), torch.linspace(0.1, 9, 40)
    weight = torch.randn((40, 8), generator=torch.Generator().manual_seed(0))
    choice = Choice(int8=True, divisor=divisor, covariance=observe(None, x))
    values, scale = choice.quantized(weight)
    exact = x @ weight
    assert (x / divisor @ (values.float() * scale) - exact).norm() < 0.005 * exact.norm()


def test_covariances_add_up_and_wide_layers_have_none() -> None:
    x = inputs(60, 10, 3, 0)
    parts = observe(observe(None, x[:20].view(4, 5, 10)), x[20:])
    assert parts is not None
    torch.testing.assert_close(parts, x.t() @ x)
    assert observe(None, torch.ones(1, WIDEST + 1)) is None


def test_inputs_that_overflowed_say_nothing() -> None:
    weight = torch.randn((4, 3), generator=torch.Generator().manual_seed(0))
    plain, _ = quantize_weight(weight)
    assert torch.equal(plain, quantize_weight(weight, covariance=torch.full((4, 4), torch.inf))[0])


def test_fp8_has_no_use_for_it() -> None:
    weight = torch.randn((40, 8), generator=torch.Generator().manual_seed(0))
    plain, _ = quantize_weight(weight, FP8)
    assert torch.equal(plain, quantize_weight(weight, FP8, torch.ones(40, 40))[0])
