"""How large the numbers inside a network get in rollouts, and which layers float16 cannot hold.

Norms, rotary positions, modulations, gates and the residual stream of an fp16 engine are float32 whatever is
found here; products and attention are float16 where the ranges allow it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from asd_rt.errors import EngineError
from asd_rt.manifest import Manifest
from export.quantize import Scheme
from export.reference import TorchDenoiser
from export.rollouts import play_rollouts
from export.simulate import layers_of
from train.checkpoint import Checkpoint
from train.model import Attention, WanModel

LARGEST = 65504.0  # of float16
USED = LARGEST / 2  # what rollouts may reach: prompts and noise of users may go further
NORMAL = 2.0**-14  # smaller numbers lose bits
ALWAYS_FLOAT32 = ("norms", "rotary positions", "modulation", "gates", "residual stream")
log = logging.getLogger(__name__)


@dataclass
class Range:
    """What passed one place: the largest magnitude, and the root of the mean square."""

    largest: float = 0.0
    squares: float = 0.0
    count: int = 0

    def see(self, x: Tensor) -> None:
        self.largest = max(self.largest, float(x.abs().max()))
        self.squares += float(x.double().square().sum())
        self.count += x.numel()

    @property
    def rms(self) -> float:
        return sqrt(self.squares / max(1, self.count))

    def fits(self) -> bool:
        """Whether float16 holds it: no overflow with some room, and typical values not subnormal."""
        return self.largest <= USED and (self.rms >= NORMAL or not self.largest)


def choose_float32(
    checkpoint: Checkpoint, model: WanModel, manifest: Manifest, seed: int = 0
) -> Scheme:
    """Which products of an fp16 engine are float32: those whose input, output or weights float16 cannot hold.

    Args:
        checkpoint: of the student.
        model: `checkpoint.build_model()`, float32.
        manifest: geometry and schedule of the engine to be.
        seed: of noise and prompts.

    Raises:
        EngineError: float16 cannot hold what has to be float16 (keys and values, the prompt's layers); the
            first such layer is named.
    """
    places: dict[str, Range] = {}
    with _watched(model, lambda name, x: places.setdefault(name, Range()).see(x)):
        play_rollouts(checkpoint, manifest, TorchDenoiser(model), "fp16: ranges", seed)
    for name in _fixed(model):
        found = places[name]
        if not found.fits():
            raise EngineError(
                f"{manifest.name}: layer {name} reaches {found.largest:.3g} in rollouts (rms "
                f"{found.rms:.2g}) and has to be float16, in {NORMAL:.1e} to {USED:.0f}; use bf16 "
                "or fp32, or look for weights that are too large there"
            )
    wide = []
    for layer in layers_of(model):
        parts = [places[f"{layer.name} {side}"] for side in ("input", "output")]
        for linear in layer.linears:
            parts.append(Range())
            parts[-1].see(linear.weight)
        if not all(part.fits() for part in parts):
            wide.append(layer.name)
    if wide:
        log.info("  fp16      %d products stay in float32: %s", len(wide), ", ".join(wide))
    figures = {
        "always_float32": list(ALWAYS_FLOAT32),
        "float32_layers": wide,
        "largest": {name: float(f"{x.largest:.3g}") for name, x in sorted(places.items())},
    }
    return Scheme(wide=tuple(wide), figures=figures)


def _fixed(model: WanModel) -> Iterator[str]:
    """Places that are float16 in every fp16 engine, in the order in which they are reached."""
    yield from ("text_embedding.0", "text_embedding.2")
    for i in range(len(model.blocks)):
        yield from (f"blocks.{i}.cross_attn.{part}" for part in ("k", "v"))
    for i in range(len(model.blocks)):
        yield from (f"blocks.{i}.self_attn.{part}" for part in ("norm_k", "v"))


Seen = Callable[[str, Tensor], None]
Look = Callable[[Tensor, Any], None]  # at a module's input and output


@contextmanager
def _watched(model: WanModel, see: Seen) -> Iterator[None]:
    """Let `see` look at all places, by name."""
    handles = []

    def watch(module: nn.Module, look: Look) -> None:
        handles.append(
            module.register_forward_hook(lambda _, inputs, output: look(inputs[0], output))
        )

    def see_input(name: str) -> Look:
        return lambda x, _: see(name, x)

    def see_output(name: str) -> Look:
        return lambda _, y: see(name, y[0] if isinstance(y, tuple) else y)

    for layer in layers_of(model):
        watch(layer.linears[0], see_input(f"{layer.name} input"))
        for linear in layer.linears:
            watch(linear, see_output(f"{layer.name} output"))
    for name in _fixed(model):
        watch(model.get_submodule(name), see_output(name))
    for i, block in enumerate(model.blocks):
        watch(block, see_output(f"blocks.{i} residual stream"))
        for part in ("self_attn", "cross_attn"):
            attention = cast(Attention, block.get_submodule(part))
            scores = _Scores(attention.heads, see_output(f"blocks.{i}.{part} scores, at most"))
            watch(attention.norm_q, scores.looking("q"))
            watch(attention.norm_k, scores.looking("k"))
    watch(model.time_projection, see_output("modulation"))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Scores:
    """A bound of what goes into a softmax: the longest query times the longest key of any head."""

    def __init__(self, heads: int, look: Look) -> None:
        self._heads, self._look = heads, look
        self._longest = {"q": 0.0, "k": 0.0}

    def looking(self, side: str) -> Look:
        """At the norm of `side`, q or k."""
        return lambda _, y: self._see(side, y)

    def _see(self, side: str, x: Tensor) -> None:
        by_head = x.view(*x.shape[:-1], self._heads, -1)
        size = float(by_head.norm(dim=-1).max())
        self._longest[side] = max(self._longest[side], size)
        bound = self._longest["q"] * self._longest["k"] / sqrt(by_head.shape[-1])
        self._look(x, torch.tensor([bound]))
