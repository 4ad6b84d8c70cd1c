"""The input of every int8 product: its scale, and how far its channels are smoothed into the weights.

Both are the ones that cost least at a layer's output, over two looks at the same rollouts; of them, sums and
maxima alone are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from asd_rt.errors import EngineError
from export.quantize import SMOOTHED, fake_quantize, quantize_weight
from export.simulate import Layer, watched

# Of the largest input; what lies beyond is clipped.
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# How much of a channel's size goes from inputs into weights; 0 = nothing is moved at all.
ALPHAS = (0.0, 0.35, 0.5, 0.65, 0.8, 0.9)
SEEN_TOKENS = 64  # of a pass, to try clips and alphas on
TINY = 1e-12


def find_ranges(layers: list[Layer], play: Callable[[str], None]) -> None:
    """Give every layer the scale and the divisor of its input, and its inputs' covariance.

    Args:
        layers: of a network.
        play: runs that network's rollouts, the same ones each time; its argument says what for.

    Raises:
        EngineError: an outlier channel leaves nothing of the others in int8; its layer is named.
    """
    sums = {layer: _Sums(layer) for layer in layers}

    def look(layer: Layer, x: Tensor) -> None:
        sums[layer].see(x)
        layer.observe(x)

    with watched(layers, look):
        play("ranges")
    for layer, seen in sums.items():
        seen.prepare(layer)
    with watched(layers, lambda layer, x: sums[layer].try_out(x)):
        play("smoothing")
    for layer, seen in sums.items():
        seen.choose(layer)
    _check_outliers(sums)


def _check_outliers(sums: Mapping[Layer, _Sums]) -> None:
    """Refuse layers of whose inputs int8 leaves -1, 0 and 1 in most channels, because of a few large ones."""
    found = {}
    for layer, seen in sums.items():
        largest = seen.largest if layer.divisor is None else seen.largest / layer.divisor
        used = largest[largest > TINY]
        if not layer.form.dtype.is_floating_point and len(used) and used.median() < layer.scale:
            channel = int(largest.argmax())
            found[layer.name] = (
                f"{layer.name} (input channel {channel} reaches {seen.largest[channel]:.3g}, "
                f"{float(largest.max() / used.median()):.0f} times the middle one)"
            )
    if found:
        raise EngineError(
            f"int8: outlier channels leave next to nothing of the others in {', '.join(found.values())}; "
            f"mend the checkpoint, or let these layers be floating point: --keep-layers {','.join(found)}"
        )


class _Sums:
    """What rollouts told of the input of one layer, channel by channel."""

    def __init__(self, layer: Layer) -> None:
        channels, self.form = layer.linears[0].in_features, layer.form
        self.largest = torch.zeros(channels)
        self.squares = torch.zeros(channels)
        self.tokens = 0
        self.smoothed = layer.kind in SMOOTHED
        self.divisors: list[Tensor | None] = []
        self.errors = torch.zeros(0)

    def see(self, x: Tensor) -> None:
        """First look at inputs [..., in]."""
        x = x.flatten(0, -2)
        self.largest = torch.maximum(self.largest, x.abs().amax(dim=0))
        self.squares += x.square().sum(dim=0)
        self.tokens += len(x)

    def prepare(self, layer: Layer) -> None:
        """Between the looks: what there is to try, and what each would cost in the weights."""
        whole = torch.cat([linear.weight for linear in layer.linears]).t()  # [in, out]
        tops = whole.abs().amax(dim=1).clamp_min(TINY)
        alphas = ALPHAS if self.smoothed else (0.0,)
        self.divisors = [self._divisor(alpha, tops) for alpha in alphas]
        self.reach, self.gains, lost = [], [], []
        for divisor in self.divisors:
            weight = whole if divisor is None else whole * divisor[:, None]
            values, scale = quantize_weight(weight, self.form)
            inputs = self.squares if divisor is None else self.squares / divisor.square()
            error = (values.float() * scale - weight).square().sum(dim=1)
            lost.append(float((error * inputs).sum() / max(1, self.tokens)))
            largest = self.largest if divisor is None else self.largest / divisor
            self.reach.append(max(float(largest.max()), TINY))
            self.gains.append(weight.square().sum(dim=1))  # from an input's error to the output's
        if self.smoothed and layer.covariance is not None:
            share = self._loss(whole, layer, layer.covariance) / max(lost[0], TINY)
            lost = [share * error for error in lost]
        self.lost, self.errors, self.tried = lost, torch.zeros(len(lost), len(CLIPS)), 0

    def _loss(self, whole: Tensor, layer: Layer, covariance: Tensor) -> float:
        """What weights cost as they are really rounded, with nothing moved into them."""
        values, scale = layer.choice("weights").quantized(whole)
        error = values.float() * scale - whole
        return float((error * (covariance @ error)).sum() / max(1, self.tokens))

    def _divisor(self, alpha: float, tops: Tensor) -> Tensor | None:
        """float32 [in], of geometric mean 1; SmoothQuant, formula 4."""
        if not alpha:
            return None
        log_size = alpha * self.largest.clamp_min(TINY).log() - (1 - alpha) * tops.log()
        # A channel that is always zero has no say in the mean, and may not go far from it.
        log_size = (log_size - log_size.median()).clamp(-7, 7)
        return log_size.exp()

    def try_out(self, x: Tensor) -> None:
        """Second look at inputs [..., in]: what each divisor and clip would cost.

        Errors of channels are taken as independent, so that no product is needed.
        """
        x = x.flatten(0, -2)
        x = x[:: -(-len(x) // SEEN_TOKENS)]
        self.tried += len(x)
        for i, divisor in enumerate(self.divisors):
            y = x if divisor is None else x / divisor
            scales = self.reach[i] / self.form.largest * torch.tensor(CLIPS)[:, None, None]
            error = fake_quantize(y, scales, self.form) - y  # [clips, tokens, in]
            self.errors[i] += (error.square().sum(dim=1) * self.gains[i]).sum(dim=1)

    def choose(self, layer: Layer) -> None:
        """Give the layer the divisor and the scale that cost least."""
        total = self.errors / max(1, self.tried) + torch.tensor(self.lost)[:, None]
        best, clip = divmod(int(total.argmin()), len(CLIPS))
        layer.divisor = self.divisors[best]
        layer.scale = self.reach[best] * CLIPS[clip] / layer.form.largest
