"""TAEHV's decoder (taew2_1 for Wan2.1), the fast one for live use, as a streaming function.

Layout of madebyollin's TAEHV with patch size 1: a row of layers that work on each frame by itself, but for
memory blocks, which also see the frame before at their place in the row, zeros at first. So the caches of a
step are one frame a memory block, and running on is the same as running over the whole clip. It takes the
denoiser's latents as they are and gives 4 frames for each; the first 3 of a video are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.vae import Shapes, Tape

GROWTH = (1, 2, 2)  # frames that each stage makes of one
MEMORIES = 3  # memory blocks of a stage
FIRST_DROPPED = 3


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = {"0": _conv(2 * channels, channels)}
        convs |= {name: _conv(channels, channels) for name in ("2", "4")}
        self.conv = nn.ModuleDict(convs)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        if tape.is_first:
            before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            tape.keep(x[-1:])
        else:
            before = tape.extend(x)[:-1]
        y = F.relu(self.conv["0"](torch.cat([x, before], dim=1)))
        return F.relu(self.conv["4"](F.relu(self.conv["2"](y))) + x)


class Grow(nn.Module):
    """A 1x1 convolution whose outputs are `times` frames."""

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, times * channels, 1, bias=False)
        self._times = times

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self._times, x.shape[1])).flatten(0, 1)


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class TaehvDecoder(nn.Module):
    """The denoiser's latents [F, channels, h, w] -> frames [F', 3, 8h, 8w] in -1..1, with 9 caches.

    `layers` are numbered as in the stored state dict, whose keys are theirs with `decoder.` before.
    """

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        """`widths`: channels of the three stages and of the last layer (256, 128, 64, 64)."""
        super().__init__()
        layers: dict[str, nn.Module] = {"1": _conv(channels, widths[0])}
        for stage, times in enumerate(GROWTH):
            start, width = 3 + 6 * stage, widths[stage]
            layers |= {str(start + i): MemoryBlock(width) for i in range(MEMORIES)}
            layers[str(start + 4)] = Grow(width, times)
            layers[str(start + 5)] = _conv(width, widths[stage + 1], bias=False)
        layers["22"] = _conv(widths[-1], 3)
        self.layers = nn.ModuleDict(layers)

    def forward(
        self, latents: Tensor, caches: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        tape, layers = Tape(caches), self.layers
        x = F.relu(layers["1"](torch.tanh(latents / 3) * 3))
        for start in (3, 9, 15):
            for i in range(MEMORIES):
                x = layers[str(start + i)](x, tape)
            x = layers[str(start + 4)](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = layers[str(start + 5)](x)
        frames = layers["22"](F.relu(x)).clamp(0, 1) * 2 - 1
        return frames[FIRST_DROPPED:] if tape.is_first else frames, tape.made

    def stored_shapes(self) -> Shapes:
        """Stored name -> shape."""
        return {f"decoder.{name}": tuple(t.shape) for name, t in self.layers.state_dict().items()}


def taehv_sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, tuple[int, ...]] | None:
    """Latent channels and widths that stored tensors tell; None where they are not TAEHV's decoder.

    Args:
        shapes: by stored name.
    """
    firsts = [shapes.get(f"decoder.{i}.weight", ()) for i in (1, 8, 14, 20)]
    if "decoder.3.conv.0.weight" not in shapes or not all(len(shape) == 4 for shape in firsts):
        return None
    return firsts[0][1], tuple(shape[0] for shape in firsts)
