"""Muon, with matrices of one shape orthogonalised together, in what this processor multiplies fast.

torch.optim.Muon takes them one by one and always in bfloat16, which a processor without instructions for it
computes some fifty times slower than float32.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from train.optimizers import WEIGHT_DECAY, adamw, load_optimizer_state, optimizer_state
from train.parallel import gathered, placed_like
from train.precision import has_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: all singular values become about 1.

    Args:
        matrices: [N, rows, columns], float32 or bfloat16.

    Returns:
        of the same shape and dtype.

    Source: Muon (https://kellerjordan.github.io/posts/muon), a quintic Newton-Schulz iteration.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon with Nesterov momentum and AdamW's step size; the same state, so checkpoints go on."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of all matrices that have a gradient; `closure` is not used."""
        dtype = torch.bfloat16 if has_bf16() else torch.float32
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                momentum = state["momentum_buffer"]
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                alike[matrix.shape].append((matrix, matrix.grad.lerp(momentum, group["momentum"])))
            for shape, pairs in alike.items():
                updates = torch.stack([gathered(update) for _, update in pairs])
                updates = orthogonalised(updates.to(dtype))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for (matrix, _), update in zip(pairs, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(placed_like(update, matrix), alpha=-rate)


class MuonAdam:
    """Muon for the matrices inside the blocks, AdamW for everything else; AdamW for all without a muon_lr."""

    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float) -> None:
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            inside = muon_lr and name.startswith("blocks.") and parameter.ndim == 2
            (matrices if inside else others).append(parameter)
        self._model = model
        self.parts: list[torch.optim.Optimizer] = [adamw(others, adam_lr, (0.9, 0.98))]
        self.lrs = [adam_lr]
        if matrices:
            self.parts.insert(0, Muon(matrices, muon_lr, weight_decay=WEIGHT_DECAY))
            self.lrs.insert(0, muon_lr)

    def step(self, factor: float) -> None:
        """Update with learning rates times `factor`, then clear the gradients."""
        for part, lr in zip(self.parts, self.lrs, strict=True):
            for group in part.param_groups:
                group["lr"] = lr * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The state of both parts, by parameter."""
        return {k: v for part in self.parts for k, v in optimizer_state(part, self._model).items()}

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take up what `state` gave."""
        for part in self.parts:
            load_optimizer_state(part, self._model, state)
