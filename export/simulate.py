"""int8 in the torch network: layers that compute as an engine would, and passes that say what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf, isnan
from typing import Literal, cast

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from asd_rt.backends.base import FloatArray
from export.gptq import observe
from export.metrics import relative_l2
from export.quantize import INT8, LAYERS, Choice, Format, fake_quantize
from export.reference import TorchDenoiser
from train.model import WanModel

Note = Callable[[float], None]
Level = Literal["int8", "weights"]  # int8 inputs and weights, or weights alone
RANKED_RUNS = 600  # of single layers: to try all of them on every pass takes long


@dataclass(eq=False)
class Layer:
    """One product of the network, with the input scale and divisor that were chosen for it.

    Attributes:
        covariance: of its inputs, float32 [in, in], where they were looked at and are not too many.
        errors: worst of a pass with this layer alone at each level.
    """

    name: str
    linears: list[nn.Linear]
    scale: float = 0.0
    divisor: Tensor | None = None
    form: Format = INT8
    covariance: Tensor | None = None

    def __post_init__(self) -> None:
        self.errors: dict[Level, float] = {"int8": 0.0, "weights": 0.0}
        self._made: dict[tuple[nn.Linear, Level], tuple[Tensor, Tensor]] = {}

    def observe(self, x: Tensor) -> None:
        """Take inputs [..., in] into the covariance; fp8 has no use for it."""
        if not self.form.dtype.is_floating_point:
            self.covariance = observe(self.covariance, x)

    def choice(self, level: Level) -> Choice:
        """How it is computed at `level`."""
        scale, divisor = (self.scale, self.divisor) if level == "int8" else (None, None)
        return Choice(True, scale, divisor, form=self.form, covariance=self.covariance)

    def quantized(self, linear: nn.Linear, level: Level) -> tuple[Tensor, Tensor]:
        """Weight [in, out] of one of its linears in 8 bits and its scales, made once: that takes a while."""
        if (linear, level) not in self._made:
            self._made[linear, level] = self.choice(level).quantized(linear.weight.t())
        return self._made[linear, level]

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


class OverBudgetError(Exception):
    """A pass is worse than allowed: it is of no interest how much, nor what other passes are."""


class Simulated:
    """Linear layers that compute as `levels` says, while it is not empty."""

    def __init__(self, layers: Sequence[Layer], widened: bool = False) -> None:
        """`widened`: hold quantised weights in float32, which is quicker than to widen them in every pass."""
        self.layers, self._widened = layers, widened
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
        # A large network is not to be in memory twice more.
        kept: dict[Level, Callable[[], Tensor]] = {}

        def quantized(level: Level) -> Callable[[], Tensor]:
            values, scale = layer.quantized(linear, level)
            if not self._widened:
                return lambda: (values.float() * scale).t()
            wide = (values.float() * scale).t().contiguous()
            return lambda: wide

        def compute(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            level = self.levels.get(layer)
            if level is None:
                return None
            if level not in kept:
                kept[level] = quantized(level)
            x = inputs[0]
            if level == "int8":
                x = x if layer.divisor is None else x / layer.divisor
                x = fake_quantize(x, layer.scale, layer.form)
            return F.linear(x, kept[level](), linear.bias)

        return compute


class Compared(TorchDenoiser):
    """Every pass twice, with int8 as `levels` says and without; the rollout goes on without.

    Of noisy passes the flows are compared, of clean ones the keys and values that they write.
    """

    def __init__(
        self, model: WanModel, simulated: Simulated, levels: Levels, limit: float = inf
    ) -> None:
        """`limit`: an error above it ends the rollout with OverBudgetError."""
        super().__init__(model)
        self._simulated, self._levels, self._limit = simulated, levels, limit
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
        self.worst = max(self.worst, inf if isnan(error) else error)
        if self.worst > self._limit:
            raise OverBudgetError


class Ranked(Compared):
    """Some passes once more for each layer and level, with int8 in that layer alone; notes `Layer.errors`.

    Half of them are noisy ones, the others clean, spread over the rollouts.
    """

    def __init__(self, model: WanModel, simulated: Simulated, passes: tuple[int, int]) -> None:
        """`passes`: how many noisy and clean ones the rollouts have."""
        super().__init__(model, simulated, {})
        each = sum(len(layer.errors) for layer in simulated.layers)
        wanted = max(1, RANKED_RUNS // (2 * max(1, each)))
        self._every = [-(-count // wanted) for count in passes]
        self._seen = [0, 0]

    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        kind = 0 if timestep else 1
        self._seen[kind] += 1
        # The middle of each stretch: the first pass of a video has no past.
        self._looks = self._seen[kind] % self._every[kind] == self._every[kind] // 2
        return super().denoise(latents, timestep, frames, past_frames)

    def _look(self, run: Callable[[Levels], FloatArray]) -> list[tuple[Note, FloatArray]]:
        if not self._looks:
            return []
        return [
            (partial(layer.note, level), run({layer: level}))
            for layer in self._simulated.layers
            for level in layer.errors
        ]
