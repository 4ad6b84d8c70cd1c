"""What an int8 engine needs to know of its network: ranges of inputs, and which layers int8 would spoil.

Both come from rollouts of the student itself (`export.rollouts`); of them, sums and maxima alone are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from asd_rt.machine import give_back_memory
from asd_rt.manifest import Manifest
from asd_rt.planner import is_large, pass_parameters
from export.quantize import INT8, NO_WISH, Format, Scheme, Wish
from export.reference import TorchDenoiser
from export.rollouts import LARGEST, SMALL, count_passes, play_rollouts
from export.simulate import (
    Compared,
    Layer,
    Level,
    OverBudgetError,
    Ranked,
    Simulated,
    layers_of,
    watched,
)
from export.smoothing import find_ranges
from train.checkpoint import Checkpoint
from train.model import WanModel

COSTLY_WEIGHTS = 30e6  # of a pass, from which on it takes a second at the latents of a rollout
log = logging.getLogger(__name__)


def choose_scheme(
    checkpoint: Checkpoint,
    model: WanModel,
    manifest: Manifest,
    budget: float,
    seed: int = 0,
    wish: Wish = NO_WISH,
    form: Format = INT8,
) -> Scheme:
    """Ranges of all products in blocks, and those to leave alone so that a pass stays within `budget`.

    A layer that int8 would spoil gets its inputs back in floating point, which costs no bytes; where that is
    not enough, its weights too. Those that spoil most go first.

    Args:
        checkpoint: of the student; its own prompts are used where it has some.
        model: `checkpoint.build_model()`, float32.
        manifest: geometry and schedule of the engine to be.
        budget: largest relative L2 error of a pass, against float32, over the rollouts.
        seed: of noise and prompts.
        wish: what is decided by hand.
        form: of 8 bits; "int8" stands for it.

    Raises:
        EngineError: an outlier channel leaves nothing of the others in int8; its layer is named.
    """

    def play(denoiser: TorchDenoiser, what: str, size: tuple[int, int] = LARGEST) -> None:
        play_rollouts(checkpoint, manifest, denoiser, f"{form.name}: {what}", seed, size)

    layers = [layer for layer in layers_of(model, form) if layer.name not in wish.keep]
    if wish.activations == "int8":
        find_ranges(layers, lambda what: play(TorchDenoiser(model), what))
    else:
        with watched(layers, Layer.observe):
            play(TorchDenoiser(model), "covariances")
    give_back_memory()

    widened = not is_large(checkpoint.config)
    # Of hundreds of passes each is to be short.
    size = SMALL if pass_parameters(checkpoint.config) > COSTLY_WEIGHTS else LARGEST

    def error_of(levels: dict[Layer, Level], what: str) -> float:
        """The worst pass, or the first that exceeds the budget."""
        with Simulated(layers, widened) as simulated:
            compared = Compared(model, simulated, levels, limit=budget)
            with suppress(OverBudgetError):
                play(compared, what, size)
        return compared.worst

    levels: dict[Layer, Level] = dict.fromkeys(
        layers, "int8" if wish.activations == "int8" else "weights"
    )
    error = error_of(levels, "all layers")
    if error > budget:
        with Simulated(layers, widened) as simulated:
            ranked = Ranked(model, simulated, count_passes(manifest))
            play(ranked, "layer by layer", size)
        steps, error = _steps(layers, wish), 0.0

        def holds(count: int) -> bool:
            nonlocal error
            found = error_of(_after(levels, steps[:count]), f"{count} eased")
            if found <= budget:
                error = found
            return found <= budget

        enough = fewest(len(steps), _guess(levels, steps, budget), holds)
        levels = _after(levels, steps[:enough])
        layers.sort(key=lambda layer: layer.errors["int8"], reverse=True)
    return _scheme(layers, levels, error, budget, wish, form)


def _scheme(
    layers: list[Layer],
    levels: dict[Layer, Level],
    error: float,
    budget: float,
    wish: Wish,
    form: Format,
) -> Scheme:
    scales = {layer.name: layer.scale for layer in layers if levels.get(layer) == "int8"}
    eased = tuple(layer.name for layer in layers if levels.get(layer) == "weights")
    kept = tuple(layer.name for layer in layers if layer not in levels)
    log.info("  %-9s pass %.1e in simulation (budget %.0e), of %d layers: %d with inputs as they are, "
             "%d kept", form.name, error, budget, len(layers) + len(wish.keep), len(eased),
             len(kept) + len(wish.keep))  # fmt: skip
    return Scheme(
        scales,
        (*wish.keep, *kept),
        {"simulated_pass": float(f"{error:.3g}"), "asked": wish.to_json()},
        eased,
        {
            layer.name: layer.divisor
            for layer in layers
            if layer.name in scales and layer.divisor is not None
        },
        form=form,
        covariances={
            layer.name: layer.covariance
            for layer in layers
            if layer in levels and layer.covariance is not None
        },
    )


@dataclass(frozen=True)
class _Step:
    """A layer that gets its inputs back, or else its weights too; `gain` is the error that it then loses."""

    gain: float
    layer: Layer
    inputs: bool


def _steps(layers: list[Layer], wish: Wish) -> list[_Step]:
    """All that can be eased, what gains most first; the inputs of a layer always before its weights."""
    steps = []
    for layer in layers:
        whole, weights = layer.errors["int8"], layer.errors["weights"]
        if wish.activations == "int8":
            steps.append(_Step(max(whole, weights), layer, inputs=True))
        steps.append(_Step(weights, layer, inputs=False))
    return sorted(steps, key=lambda step: (-step.gain, not step.inputs))


def _after(levels: dict[Layer, Level], steps: list[_Step]) -> dict[Layer, Level]:
    """`levels` with `steps` taken."""
    made = dict(levels)
    for step in steps:
        if step.inputs:
            made[step.layer] = "weights"
        else:
            del made[step.layer]
    return made


def _guess(levels: dict[Layer, Level], steps: list[_Step], budget: float) -> int:
    """How many `steps` hold the budget if errors of layers are independent: their squares add up."""
    for count in range(1, len(steps)):
        left = _after(levels, steps[:count])
        if sum(layer.errors[level] ** 2 for layer, level in left.items()) <= budget**2:
            return count
    return len(steps)


def fewest(total: int, guess: int, holds: Callable[[int], bool]) -> int:
    """About the least number in 1 .. `total` that `holds`: `total` does, and with a number all larger ones.

    Each try is costly, so they begin at `guess` and go away from it in growing strides, then by halves. The
    last one that held was tried last among those.
    """
    too_few, enough, count, stride = 0, total, guess, 1
    while enough - too_few > 1:
        count = min(max(count, too_few + 1), enough - 1)
        if holds(count):
            enough = count
            count -= stride
        else:
            too_few = count
            count += stride
        stride *= 2
        if not too_few < count < enough:
            count = (too_few + enough) // 2
    return enough
