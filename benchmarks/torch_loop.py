"""The rival: the same frame loop on PyTorch, as plain as its users write it, but with nothing done twice.

`train.model` in eager or compiled mode, float32 or bfloat16, behind the runtime's own protocol. Like a good
PyTorch runtime it keeps a static cache in its own dtype, and computes modulations and rotary tables once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asd_rt.backends.base import FloatArray
from asd_rt.manifest import Manifest
from export.reference import TorchDenoiser, TorchEngine
from train.checkpoint import Checkpoint
from train.model import KeyValue, Rope, WanModel, make_rope


@dataclass(frozen=True)
class Way:
    """How PyTorch runs the network."""

    name: str
    dtype: torch.dtype
    compiled: bool


WAYS = (
    Way("eager fp32", torch.float32, compiled=False),
    Way("eager bf16", torch.bfloat16, compiled=False),
    Way("torch.compile fp32", torch.float32, compiled=True),
    Way("torch.compile bf16", torch.bfloat16, compiled=True),
)


class TorchLoopDenoiser(TorchDenoiser):
    """The reference, made as fast as PyTorch allows; it joins no passes."""

    can_join = False

    def __init__(self, model: WanModel, way: Way) -> None:
        super().__init__(model)
        self.dtype = way.dtype
        self._run = torch.compile(model.denoise, dynamic=False) if way.compiled else model.denoise
        self._times: dict[tuple[float, int], tuple[Tensor, Tensor]] = {}
        self._rope: tuple[range, Rope] | None = None

    def prepare(self, batch: int, latent_hw: tuple[int, int], capacity_frames: int) -> None:
        super().prepare(batch, latent_hw, capacity_frames)
        self._cache = [KeyValue(*(x.to(self.dtype) for x in layer)) for layer in self._cache]
        self._rope = None

    @torch.inference_mode()
    def set_prompt(self, context: FloatArray) -> None:
        self._prompt = self.model.embed_prompt(torch.from_numpy(context).to(self.dtype))

    @torch.inference_mode()
    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        key = (timestep, len(frames))
        if key not in self._times:
            self._times[key] = self.model.embed_time(torch.full((1, len(frames)), timestep))
        if self._rope is None or self._rope[0] != frames:
            tables = make_rope(self.model.config, frames, self._token_hw)
            self._rope = frames, tables
        past = past_frames * self._frame_tokens
        prefix = [KeyValue(layer.k[:past], layer.v[:past]) for layer in self._cache]
        x = torch.from_numpy(latents).to(self.dtype)
        flow, new = self._run(x, self._times[key], self._prompt, self._rope[1], prefix)
        end = past + len(frames) * self._frame_tokens
        for layer, kv in zip(self._cache, new, strict=True):
            layer.k[past:end], layer.v[past:end] = kv
        return flow.float().numpy()


def torch_engine(checkpoint: Checkpoint, manifest: Manifest, way: Way) -> TorchEngine:
    """The weights of `checkpoint` run by `way`, with the geometry and schedule of `manifest`."""
    engine = TorchEngine(checkpoint, manifest)
    model = checkpoint.build_model().to(way.dtype)
    engine.denoiser = TorchLoopDenoiser(model, way)
    return engine
