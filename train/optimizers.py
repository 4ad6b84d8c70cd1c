"""AdamW, its schedule, the moving average of weights, and optimizers' state by parameters' names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.parallel import local

WEIGHT_DECAY = 0.01


class Ema:
    """Exponential moving average of a network's parameters, float32, in the same shards as these."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: p.detach().clone() for k, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float | None = None) -> None:
        weight = 1 - (self.decay if decay is None else decay)
        torch._foreach_lerp_(
            [local(value) for value in self.values.values()],
            [local(p.detach()) for p in model.parameters()],
            weight,
        )


def warmup_cosine(index: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear rise over `warmup`, then half a cosine down to `floor`."""
    if index < warmup:
        return (index + 1) / warmup
    progress = (index - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(
    parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW as all networks here are trained with; it exists on the meta device too, to be measured."""
    fused = not parameters[0].is_meta
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=WEIGHT_DECAY, fused=fused)


def _named(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> Iterator[tuple[str, nn.Parameter]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        yield from ((names[parameter], parameter) for parameter in group["params"])


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, dict[str, Tensor]]:
    """State tensors of an optimizer, by parameter and their own name; those not there yet are made, as zeros.

    So a checkpoint always holds the same tensors, and one of shards has something to be read into.
    """
    found = {}
    for name, parameter in _named(optimizer, model):
        state: dict[str, Any] = optimizer.state[parameter]
        if not state and isinstance(optimizer, torch.optim.Muon):
            state["momentum_buffer"] = torch.zeros_like(parameter)
        elif not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        found[name] = dict(state)
    return found


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Take up what `optimizer_state` gave."""
    for name, parameter in _named(optimizer, model):
        optimizer.state[parameter] = dict(state[name])
