"""The input of an int8 product: what smoothing takes out of it, and what it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from asd_rt.errors import EngineError
from export.quantize import SMOOTHED, fake_quantize, quantize_weight
from export.simulate import Layer
from export.smoothing import find_ranges

CHANNELS, OUTLIER = 32, 5


def ranged(size: float, kind: str) -> tuple[Layer, Tensor]:
    """A layer of `kind` that has seen inputs whose channel OUTLIER is `size` times as large; those inputs."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((400, CHANNELS), generator=draw)
    x[:, OUTLIER] *= size
    linear = nn.Linear(CHANNELS, 16)
    nn.init.normal_(linear.weight, generator=draw)
    layer = Layer(f"blocks.0.{kind}", [linear])

    def play(_: str) -> None:
        for part in x.split(50):
            linear(part)

    with torch.no_grad():
        find_ranges([layer], play)
    return layer, x


def error(layer: Layer, x: Tensor) -> float:
    """Relative L2 of the int8 product."""
    weight = layer.linears[0].weight.detach()
    divisor = torch.ones(CHANNELS) if layer.divisor is None else layer.divisor
    values, scale = quantize_weight(weight * divisor)
    y = fake_quantize(x / divisor, torch.tensor(layer.scale)) @ (values.float() * scale).T
    exact = x @ weight.T
    return float((y - exact).norm() / exact.norm())


def test_an_outlier_channel_goes_into_the_weights_where_it_may() -> None:
    smoothed, x = ranged(100.0, sorted(SMOOTHED)[0])
    assert smoothed.divisor is not None
    assert int(smoothed.divisor.argmax()) == OUTLIER
    assert error(smoothed, x) < 0.02


def test_inputs_alike_need_no_smoothing() -> None:
    layer, x = ranged(1.0, sorted(SMOOTHED)[0])
    assert layer.divisor is None or layer.divisor.max() < 2
    assert error(layer, x) < 0.02


@pytest.mark.parametrize(("kind", "size"), [("self_attn.o", 1e3), (sorted(SMOOTHED)[0], 1e7)])
def test_what_cannot_be_moved_fails_with_layer_and_channel(kind: str, size: float) -> None:
    with pytest.raises(EngineError) as found:
        ranged(size, kind)
    said = str(found.value)
    assert f"blocks.0.{kind} (input channel {OUTLIER} reaches" in said
    assert f"--keep-layers blocks.0.{kind}" in said
