"""int8 in the torch network: layers that compute as an engine would, and passes that say what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from asd_rt.backends.base import FloatArray
from export.metrics import relative_l2
from export.quantize import INT8, LAYERS, Format, fake_quantize, quantize_weight
from export.reference import TorchDenoiser
from train.model import WanModel

Note = Callable[[float], None]
Level = Literal["int8", "weights"]  # int8 inputs and weights, or weights alone
RANKED_EVERY = 5  # passes: to try every layer takes long


@dataclass(eq=False)
class Layer:
    """One product of the network, with the input scale and divisor that were chosen for it.

    Attributes:
        errors: worst of a pass with this layer alone at each level.
    """

    name: str
    linears: list[nn.Linear]
    scale: float = 0.0
    divisor: Tensor | None = None
    form: Format = INT8

    def __post_init__(self) -> None:
        self.errors: dict[Level, float] = {"int8": 0.0, "weights": 0.0}

    def note(self, level: Level, error: float) -> None:
        """Remember the error of a pass with this layer alone at `level`."""
        self.errors[level] = max(self.errors[level], error)

    @property
    def kind(self) -> str:
        """Its name in LAYERS."""
        return self.name.split(".", 2)[2]


Levels = Mapping[Layer, Level]  # layers that are absent stay in float32


def layers_of(model: WanModel, form: Format = INT8) -> list[Layer]:
    """All products in blocks, in the order in which they run; `form` of 8 bits."""
    return [
        Layer(
            f"blocks.{i}.{name}",
            [cast(nn.Linear, block.get_submodule(source)) for source in sources],
            form=form,
        )
        for i, block in enumerate(model.blocks)
        for name, sources in LAYERS.items()
    ]


@contextmanager
def watched(layers: Sequence[Layer], see: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Let `see` look at the input of every layer, [..., in]."""

    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: see(layer, inputs[0])

    # Layers side by side have one input: it is enough to look at the first.
    handles = [layer.linears[0].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Simulated:
    """Linear layers that compute as `levels` says, while it is not empty."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.levels: Levels = {}
        self._handles = [
            linear.register_forward_hook(self._hook(layer, linear))
            for layer in layers
            for linear in layer.linears
        ]

    def __enter__(self) -> Simulated:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(
        self, layer: Layer, linear: nn.Linear
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        # Kept as int8: a large network is not to be in memory twice more.
        kept: dict[Level, tuple[Tensor, Tensor]] = {}

        def compute(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            level = self.levels.get(layer)
            if level is None:
                return None
            x, divisor = inputs[0], layer.divisor if level == "int8" else None
            if level not in kept:
                weight = linear.weight.t()
                kept[level] = quantize_weight(
                    weight if divisor is None else weight * divisor[:, None], layer.form
                )
            if level == "int8":
                x = fake_quantize(x if divisor is None else x / divisor, layer.scale, layer.form)
            values, scale = kept[level]
            return F.linear(x, (values.float() * scale).t(), linear.bias)

        return compute


class Compared(TorchDenoiser):
    """Every pass twice, with int8 as `levels` says and without; the rollout goes on without.

    Of noisy passes the flows are compared, of clean ones the keys and values that they write.
    """

    def __init__(self, model: WanModel, simulated: Simulated, levels: Levels) -> None:
        super().__init__(model)
        self._simulated, self._levels = simulated, levels
        self.worst = 0.0

    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        def run(levels: Levels) -> FloatArray:
            self._simulated.levels = levels
            flow = super(Compared, self).denoise(latents, timestep, frames, past_frames)
            # A pass on clean latents is for its keys and values alone.
            return flow if timestep else self._written(past_frames, len(frames))

        found = self._look(run)
        expected = run({})  # last, for its keys and values stay
        for note, result in found:
            note(relative_l2(result, expected))
        # What a clean pass returns is not read.
        return expected if timestep else latents

    def _written(self, past_frames: int, frames: int) -> FloatArray:
        """A copy of the keys and values of `frames` frames behind the past."""
        slots = range(past_frames, past_frames + frames)
        layers = (self.read_cache(i, slots) for i in range(self.model.config.num_layers))
        return np.stack([kv for layer in layers for kv in layer])

    def _look(self, run: Callable[[Levels], FloatArray]) -> list[tuple[Note, FloatArray]]:
        """Results to compare, each with what to do with its error."""
        return [(self._note, run(self._levels))]

    def _note(self, error: float) -> None:
        self.worst = max(self.worst, error)


class Ranked(Compared):
    """Some passes once more for each layer and level, with int8 in that layer alone; notes `Layer.errors`."""

    def __init__(self, model: WanModel, simulated: Simulated) -> None:
        super().__init__(model, simulated, {})
        self._passes = 0

    def _look(self, run: Callable[[Levels], FloatArray]) -> list[tuple[Note, FloatArray]]:
        self._passes += 1
        if self._passes % RANKED_EVERY:
            return []
        return [
            (partial(layer.note, level), run({layer: level}))
            for layer in self._simulated.layers
            for level in layer.errors
        ]
