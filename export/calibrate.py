"""What an int8 engine needs to know of its network: ranges of inputs, and which layers int8 would spoil.

Both come from rollouts of the student itself: a cache that fills and rolls, every timestep of the plans with
1 to 4 steps and the pass at t = 0, several prompts and seeds. Nothing of a rollout is kept but sums.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asd_rt.backends.base import FloatArray
from asd_rt.manifest import Manifest
from asd_rt.plan import ListedPlan
from asd_rt.progress import Progress
from asd_rt.session import Session
from export.metrics import relative_l2
from export.quantize import INT8, LAYERS, Kind, Scheme, fake_quantize, quantize_weight
from export.reference import TorchDenoiser, TorchEngine
from export.samples import latent_sizes, sample_context, sample_noise
from train.checkpoint import Checkpoint
from train.model import WanModel

# Of the largest input; what lies beyond is clipped.
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
PLANS = ((4, 1, 3, 2), (2, 4, 1, 3), (1, 3, 2, 4))
log = logging.getLogger(__name__)

LARGEST = (16, 24)  # latents of a rollout: ranges need no more
RANKED_EVERY = 5  # passes: to try every layer takes long
Note = Callable[[float], None]


@dataclass(eq=False)
class _Layer:
    """One product of the network, with what rollouts told of it."""

    name: str
    linears: list[nn.Linear]
    kind: Kind = INT8
    largest: float = 0.0
    clip_errors: Tensor = field(default_factory=lambda: torch.zeros(len(CLIPS)))
    scale: float = 0.0
    error: float = 0.0  # worst of a pass with int8 in this layer alone

    def note(self, error: float) -> None:
        self.error = max(self.error, error)


def choose_scheme(
    checkpoint: Checkpoint,
    model: WanModel,
    manifest: Manifest,
    budget: float,
    seed: int = 0,
    kind: Kind = INT8,
) -> Scheme:
    """Ranges of all products in blocks, and those to leave alone so that a pass stays within `budget`.

    Args:
        checkpoint: of the student; its own prompts are used where it has some.
        model: `checkpoint.build_model()`, float32.
        manifest: geometry and schedule of the engine to be.
        budget: largest relative L2 error of a pass, against float32, over the rollouts.
        seed: of noise and prompts.
        kind: of 8 bits; "int8" stands for it.
    """
    layers = _layers(model, kind)

    def play(denoiser: TorchDenoiser, what: str) -> None:
        with Progress(what, len(PLANS)) as progress:
            for index in range(len(PLANS)):
                _rollout(checkpoint, manifest, denoiser, index, seed)
                progress.advance()

    with _watched(layers, _note_largest):
        play(TorchDenoiser(model), f"{kind.name}: ranges")
    with _watched(layers, _note_clips):
        play(TorchDenoiser(model), f"{kind.name}: clipping")
    for layer in layers:
        best = int(layer.clip_errors.argmin())
        layer.scale = max(layer.largest * CLIPS[best], 1e-12) / kind.largest

    def error_without(kept: Sequence[_Layer], what: str) -> float:
        chosen = [layer for layer in layers if layer not in kept]
        with _Simulated(layers) as simulated:
            compared = _Compared(model, simulated, chosen)
            play(compared, what)
        return compared.worst

    error, kept = error_without((), f"{kind.name}: all layers"), []
    if error > budget:
        with _Simulated(layers) as simulated:
            play(_Ranked(model, simulated), f"{kind.name}: layer by layer")
        ranked = sorted(layers, key=lambda layer: layer.error, reverse=True)
        too_few, enough = 0, len(layers)
        # Errors of layers add up, roughly, so that a search by halves finds about the fewest.
        while enough - too_few > 1:
            count = min(max(1, 2 * too_few), (too_few + enough) // 2)
            found = error_without(ranked[:count], f"{kind.name}: {count} kept")
            if found > budget:
                too_few = count
            else:
                enough, error = count, found
        kept = ranked[:enough]
    log.info("  %-9s pass %.1e in simulation (budget %.0e), %d of %d layers kept", kind.name, error, budget,
             len(kept), len(layers))  # fmt: skip
    return Scheme(
        {layer.name: layer.scale for layer in layers if layer not in kept},
        tuple(layer.name for layer in kept),
        {"simulated_pass": float(f"{error:.3g}")},
        kind,
    )


def _layers(model: WanModel, kind: Kind) -> list[_Layer]:
    return [
        _Layer(
            f"blocks.{i}.{name}",
            [cast(nn.Linear, block.get_submodule(source)) for source in sources],
            kind,
        )
        for i, block in enumerate(model.blocks)
        for name, sources in LAYERS.items()
    ]


def _rollout(
    checkpoint: Checkpoint, manifest: Manifest, denoiser: TorchDenoiser, index: int, seed: int
) -> None:
    """Play video `index` of the calibration: its own prompt, noise and plan."""
    sizes = latent_sizes(manifest)
    rows, columns = sizes[index % len(sizes)]
    size = min(rows, LARGEST[0]), min(columns, LARGEST[1])
    noise = sample_noise(manifest, size, 1, seed + index)
    engine = TorchEngine(checkpoint, replace(manifest, latent_hw=None), denoiser.model)
    engine.denoiser = denoiser
    context = sample_context(checkpoint, 1, seed + index).numpy()
    Session(engine, join=False).replay(
        noise, context, plan=ListedPlan(PLANS[index]), dump_cache=True
    )


@contextmanager
def _watched(
    layers: list[_Layer], see: Callable[[_Layer, Tensor], Tensor | None]
) -> Iterator[None]:
    """Let `see` look at the input of every layer; what it returns takes the place of the output."""

    def hook(layer: _Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        return lambda _, inputs, output: see(layer, inputs[0])

    handles = []
    for layer in layers:
        # Layers side by side have one input: it is enough to look at the first.
        handles.append(layer.linears[0].register_forward_hook(hook(layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_largest(layer: _Layer, x: Tensor) -> None:
    layer.largest = max(layer.largest, float(x.abs().max()))


def _note_clips(layer: _Layer, x: Tensor) -> None:
    for i, clip in enumerate(CLIPS):
        scale = max(layer.largest * clip, 1e-12) / layer.kind.largest
        layer.clip_errors[i] += (fake_quantize(x, scale, layer.kind) - x).square().sum()


class _Simulated:
    """Linear layers that compute as int8 would: those of `chosen`, while it is not empty."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self.layers = layers
        self.chosen: Sequence[_Layer] = ()
        self._handles = [
            linear.register_forward_hook(self._hook(layer, linear))
            for layer in layers
            for linear in layer.linears
        ]

    def __enter__(self) -> _Simulated:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(
        self, layer: _Layer, linear: nn.Linear
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        values, scale = quantize_weight(linear.weight.t(), layer.kind)

        def compute(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if layer not in self.chosen:
                return None
            weight = (values.float() * scale).t()
            return F.linear(fake_quantize(inputs[0], layer.scale, layer.kind), weight, linear.bias)

        return compute


class _Compared(TorchDenoiser):
    """Every pass twice, with int8 in the layers of `chosen` and without; the rollout goes on without."""

    def __init__(
        self, model: WanModel, simulated: _Simulated, chosen: Sequence[_Layer] = ()
    ) -> None:
        super().__init__(model)
        self._simulated, self._chosen = simulated, chosen
        self.worst = 0.0

    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        def run(chosen: Sequence[_Layer]) -> FloatArray:
            self._simulated.chosen = chosen
            return super(_Compared, self).denoise(latents, timestep, frames, past_frames)

        found = self._look(run)
        expected = run(())
        for note, flow in found:
            note(relative_l2(flow, expected))
        return expected

    def _look(self, run: Callable[[Sequence[_Layer]], FloatArray]) -> list[tuple[Note, FloatArray]]:
        """Flows to compare, each with what to do with its error."""
        return [(self._note, run(self._chosen))]

    def _note(self, error: float) -> None:
        self.worst = max(self.worst, error)


class _Ranked(_Compared):
    """Some passes once more for each layer, with int8 in that layer alone."""

    passes = 0

    def _look(self, run: Callable[[Sequence[_Layer]], FloatArray]) -> list[tuple[Note, FloatArray]]:
        self.passes += 1
        if self.passes % RANKED_EVERY:
            return []
        return [(layer.note, run([layer])) for layer in self._simulated.layers]
