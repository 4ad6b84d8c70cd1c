"""The Wan2.1 video autoencoder as two streaming functions with explicit feature caches.

Frames are the batch axis here, [F, C, rows, columns]: one video at a time, and a causal convolution over time
is a sum of two-dimensional ones, one a tap, over shifted frames. That is the same numbers as Conv3d, twice as
fast in ONNX Runtime, and a first frame, which has nothing before it, needs the last tap alone.

A step is `module(x, caches) -> (y, caches)`. The first step of a video takes `None` for the caches and
exactly one frame; later ones take any number of latent frames (the encoder: of groups of 4 frames). A causal
convolution keeps 2 frames of its input. The temporal up-samplers pass the first frame through as it is and
do not remember it; the temporal down-samplers pass it through and remember it.

Module and parameter names are those of the official Wan2.1_VAE.pth.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.vae_config import WanVaeConfig

Shapes = dict[str, tuple[int, ...]]


class Tape:
    """The feature caches of one step, read in the order of the layers, and those that replace them."""

    def __init__(self, held: Sequence[Tensor] | None) -> None:
        self.is_first = held is None
        self._held = iter(held or ())
        self.made: list[Tensor] = []

    def extend(self, x: Tensor) -> Tensor:
        """The next cache followed by `x`, along frames; as many of the last frames as it had are kept.

        The new cache is a part of the result, so whoever writes it has read the old one: both may be one
        buffer.
        """
        past = next(self._held)
        whole = torch.cat([past, x])
        self.made.append(whole[-past.shape[0] :])
        return whole

    def keep(self, cache: Tensor) -> None:
        """In a first step, what the next one finds."""
        self.made.append(cache)


class CausalConv(nn.Module):
    """A convolution over `time` frames (this one and those before it) and `space` x `space` pixels.

    Its weight is stored as [outputs, inputs, time, space, space] and kept as one tensor a tap of time.
    """

    def __init__(self, inputs: int, outputs: int, time: int = 3, space: int = 3) -> None:
        super().__init__()
        self.stored_shape = (outputs, inputs, time, space, space)
        self.taps = nn.ParameterList(
            nn.Parameter(torch.empty(outputs, inputs, space, space)) for _ in range(time)
        )
        self.bias = nn.Parameter(torch.empty(outputs))
        self._padding = space // 2
        self.register_load_state_dict_pre_hook(_split_taps)

    def conv(self, x: Tensor, tap: int, bias: Tensor | None = None) -> Tensor:
        """One tap."""
        return F.conv2d(x, self.taps[tap], bias, padding=self._padding)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        if len(self.taps) == 1:
            return self.conv(x, 0, self.bias)
        if tape.is_first:
            tape.keep(torch.cat([torch.zeros_like(x), x]))
            return self.conv(x, 2, self.bias)
        whole = tape.extend(x)
        now = self.conv(x, 2, self.bias)
        return now + self.conv(whole[1:-1], 1) + self.conv(whole[:-2], 0)


def _split_taps(module: CausalConv, state: dict[str, Any], prefix: str, *_: Any) -> None:
    weight = state.pop(f"{prefix}weight")
    for index, tap in enumerate(weight.unbind(2)):
        state[f"{prefix}taps.{index}"] = tap.contiguous()


class Norm(nn.Module):
    """Every pixel's channels scaled to a mean square of 1, times gamma."""

    def __init__(self, channels: int, axes: int) -> None:
        """`gamma` is stored with `axes` axes of size 1 behind the channels."""
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        channels = len(self.gamma)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
        return x / length * (self.gamma.view(channels, 1, 1) * channels**0.5)


class ResidualBlock(nn.Module):
    """Norm, SiLU and causal convolution, twice, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": Norm(inputs, 3),
                "2": CausalConv(inputs, outputs),
                "3": Norm(outputs, 3),
                "6": CausalConv(outputs, outputs),
            }
        )
        self.shortcut = CausalConv(inputs, outputs, 1, 1) if inputs != outputs else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        parts = self.residual
        y = parts["2"](F.silu(parts["0"](x)), tape)
        y = parts["6"](F.silu(parts["3"](y)), tape)
        return y + (x if self.shortcut is None else self.shortcut(x, tape))


class Attention(nn.Module):
    """One head over the pixels of each frame by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # each [F, C, pixels]
        scores = (q * q.shape[1] ** -0.5).transpose(1, 2) @ k
        y = v @ scores.softmax(dim=-1).transpose(1, 2)
        return x + self.proj(y.view_as(x))


class Upsample(nn.Module):
    """Twice the rows and columns, half the channels; with `time`, twice the frames but for the first."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = CausalConv(channels, 2 * channels, 3, 1) if time else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        if self.time_conv is not None:
            if tape.is_first:
                tape.keep(torch.cat([torch.zeros_like(x)] * 2))
            else:
                pairs = self.time_conv(x, tape).unflatten(1, (2, x.shape[1]))
                x = pairs.flatten(0, 1)
        return self.resample["1"](F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Half the rows and columns; with `time`, half the frames but for the first."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = CausalConv(channels, channels, 3, 1) if time else None

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        x = self.resample["1"](F.pad(x, (0, 1, 0, 1)))
        if self.time_conv is None:
            return x
        if tape.is_first:
            tape.keep(x)
            return x
        conv, whole = self.time_conv, tape.extend(x)  # 1 + 2n frames
        now = conv.conv(whole[2::2], 2, conv.bias)
        return now + conv.conv(whole[1::2], 1) + conv.conv(whole[:-2:2], 0)


def _middle(channels: int) -> nn.ModuleList:
    ends = (ResidualBlock(channels, channels) for _ in range(2))
    return nn.ModuleList([next(ends), Attention(channels), next(ends)])


def _head(channels: int, outputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": Norm(channels, 3), "2": CausalConv(channels, outputs)})


class Encoder(nn.Module):
    """Frames [F, 3, rows, columns] -> [F', 2 * z_dim, rows / 8, columns / 8]."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * n for n in (1, *config.dim_mult)]
        self.conv1 = CausalConv(3, widths[0])
        layers: list[nn.Module] = []
        for stage, (inputs, outputs) in enumerate(pairwise(widths)):
            for block in range(config.num_res_blocks):
                layers.append(ResidualBlock(outputs if block else inputs, outputs))
            if stage < 3:
                layers.append(Downsample(outputs, config.temperal_downsample[stage]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        x = self.conv1(x, tape)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, tape)
        return self.head["2"](F.silu(self.head["0"](x)), tape)


class Decoder(nn.Module):
    """[F, z_dim, h, w] -> frames [F', 3, 8h, 8w]."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        widths = [base * n for n in (config.dim_mult[-1], *reversed(config.dim_mult))]
        doubling = tuple(reversed(config.temperal_downsample))
        self.conv1 = CausalConv(config.z_dim, widths[0])
        self.middle = _middle(widths[0])
        layers: list[nn.Module] = []
        for stage, (before, outputs) in enumerate(pairwise(widths)):
            inputs = before // 2 if stage else before  # an Upsample halves the channels
            for block in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(outputs if block else inputs, outputs))
            if stage < 3:
                layers.append(Upsample(outputs, doubling[stage]))
        self.upsamples = nn.ModuleList(layers)
        self.head = _head(widths[-1], 3)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        x = self.conv1(x, tape)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, tape)
        return self.head["2"](F.silu(self.head["0"](x)), tape)


class WanVae(nn.Module):
    """Both halves with their 1x1x1 convolutions, as one strict state dict."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.conv1 = CausalConv(2 * config.z_dim, 2 * config.z_dim, 1, 1)
        self.conv2 = CausalConv(config.z_dim, config.z_dim, 1, 1)

    def stored_shapes(self) -> Shapes:
        """Official name -> shape of every stored tensor."""
        shapes = {
            name: tuple(t.shape) for name, t in self.state_dict().items() if ".taps." not in name
        }
        for name, module in self.named_modules():
            if isinstance(module, CausalConv):
                shapes[f"{name}.weight"] = module.stored_shape
        return shapes


class WanDecoder(nn.Module):
    """The denoiser's latents [F, z_dim, h, w] -> frames in -1..1 (clamped), with 32 caches.

    The first step takes one latent frame and gives one; later ones give 4 frames for each.
    """

    def __init__(self, vae: WanVae) -> None:
        super().__init__()
        self.decoder = vae.decoder
        mean, std = (
            torch.tensor(v).view(-1, 1, 1)
            for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        weight = vae.conv2.taps[0].detach()
        self.weight = nn.Parameter(weight * std)
        self.bias = nn.Parameter(vae.conv2.bias.detach() + (weight * mean).sum(dim=(1, 2, 3)))

    def forward(
        self, latents: Tensor, caches: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        tape = Tape(caches)
        frames = self.decoder(F.conv2d(latents, self.weight, self.bias), tape)
        return frames.clamp(-1, 1), tape.made


class WanEncoder(nn.Module):
    """Frames [F, 3, rows, columns] in -1..1 -> the denoiser's latents (the posterior's mean), with 24 caches.

    The first step takes one frame and gives one latent frame; later ones take 4 frames for each.
    """

    def __init__(self, vae: WanVae) -> None:
        super().__init__()
        self.encoder = vae.encoder
        mean, std = (torch.tensor(v) for v in (vae.config.latents_mean, vae.config.latents_std))
        channels = vae.config.z_dim
        weight, bias = vae.conv1.taps[0].detach()[:channels], vae.conv1.bias.detach()[:channels]
        self.weight = nn.Parameter(weight / std.view(-1, 1, 1, 1))
        self.bias = nn.Parameter((bias - mean) / std)

    def forward(
        self, frames: Tensor, caches: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        tape = Tape(caches)
        return F.conv2d(self.encoder(frames, tape), self.weight, self.bias), tape.made
