"""Hyper-parameters of the Wan2.1 video autoencoder, and the statistics of its latents."""

from __future__ import annotations

from dataclasses import dataclass, field

from asd_rt.errors import ConfigError

SPATIAL, TEMPORAL = 8, 4
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


@dataclass(frozen=True)
class WanVaeConfig:
    """Hyper-parameters, named as in diffusers' config.json of AutoencoderKLWan.

    Attributes:
        base_dim: channels of the widest (full-size) stage of the encoder.
        decoder_base_dim: the same of the decoder; None = `base_dim`.
        z_dim: latent channels.
        dim_mult: channels of each of 4 stages, in units of `base_dim`.
        num_res_blocks: residual blocks of a stage of the encoder; the decoder has one more.
        temperal_downsample: which of the 3 steps between stages halve the frames; two of them.
        latents_mean, latents_std: per channel; the denoiser's latents are (z - mean) / std.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = field(default=MEAN)
    latents_std: tuple[float, ...] = field(default=STD)

    def __post_init__(self) -> None:
        sizes = (self.base_dim, self.z_dim, self.num_res_blocks, *self.dim_mult)
        if self.decoder_base_dim is not None:
            sizes += (self.decoder_base_dim,)
        if not all(type(n) is int and n >= 1 for n in sizes):
            raise ConfigError(f"VAE: sizes must be whole numbers >= 1, found {sizes}")
        if len(self.dim_mult) != 4 or len(self.temperal_downsample) != 3:
            raise ConfigError(
                "VAE: a Wan2.1 VAE has 4 entries in dim_mult and 3 in temperal_downsample, found "
                f"{len(self.dim_mult)} and {len(self.temperal_downsample)}"
            )
        if sum(self.temperal_downsample) != 2:
            raise ConfigError(
                "VAE: a Wan2.1 VAE halves the frames twice, found temperal_downsample "
                f"{list(self.temperal_downsample)}"
            )
        lengths = len(self.latents_mean), len(self.latents_std)
        if lengths != (self.z_dim, self.z_dim):
            raise ConfigError(
                f"VAE: latents_mean and latents_std need {self.z_dim} entries (z_dim), found "
                f"{lengths[0]} and {lengths[1]}"
            )
        if not all(std > 0 for std in self.latents_std):
            raise ConfigError(f"VAE: latents_std must be > 0, found {list(self.latents_std)}")
