"""The rival: the same frame loop on PyTorch, as plain as its users write it, but with nothing done twice.

`train.model` in eager or compiled mode, float32 or bfloat16, behind the runtime's own protocol. Like a good
PyTorch runtime it keeps a static cache in its own dtype, and computes modulations and rotary tables once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asd_rt.backends.base import FloatArray
from asd_rt.errors import BackendError
from asd_rt.kv_cache import Move
from asd_rt.manifest import Manifest
from export.reference import TorchEngine
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


class TorchLoopDenoiser:
    """See `asd_rt.backends.base.Denoiser`."""

    can_join = False

    def __init__(self, model: WanModel, way: Way) -> None:
        self.model, self.dtype = model, way.dtype
        self._pass = torch.compile(model.denoise, dynamic=False) if way.compiled else model.denoise
        self._times: dict[tuple[float, int], tuple[Tensor, Tensor]] = {}
        self._rope: tuple[range, Rope] | None = None
        self._cache: list[KeyValue] = []
        self._prompt: list[KeyValue] = []

    @torch.inference_mode()
    def prepare(self, batch: int, latent_hw: tuple[int, int], capacity_frames: int) -> None:
        config = self.model.config
        self._token_hw = (latent_hw[0] // 2, latent_hw[1] // 2)
        self._frame_tokens = self._token_hw[0] * self._token_hw[1]
        shape = (capacity_frames * self._frame_tokens, batch, config.num_heads, config.head_dim)
        self._cache = [
            KeyValue(torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype))
            for _ in range(config.num_layers)
        ]
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
        flow, new = self._pass(x, self._times[key], self._prompt, self._rope[1], prefix)
        end = past + len(frames) * self._frame_tokens
        for layer, kv in zip(self._cache, new, strict=True):
            layer.k[past:end], layer.v[past:end] = kv
        return flow.float().numpy()

    def denoise_joined(
        self,
        clean: FloatArray,
        noisy: FloatArray,
        timestep: float,
        frames: range,
        past_frames: int,
        hidden: Sequence[int],
    ) -> FloatArray:
        raise BackendError("the plain PyTorch loop joins no passes")

    @torch.inference_mode()
    def move(self, moves: Sequence[Move]) -> None:
        size = self._frame_tokens
        for move in moves:
            source = slice(move.source * size, (move.source + move.frames) * size)
            target = slice(move.target * size, (move.target + move.frames) * size)
            for layer in self._cache:
                layer.k[target], layer.v[target] = layer.k[source].clone(), layer.v[source].clone()

    def read_cache(self, layer: int, slots: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        size = self._frame_tokens
        tokens = torch.cat([torch.arange(slot * size, (slot + 1) * size) for slot in slots])
        k, v = (
            np.ascontiguousarray(buffer[tokens].transpose(0, 1).float().numpy())
            for buffer in self._cache[layer]
        )
        return k, v


def torch_engine(checkpoint: Checkpoint, manifest: Manifest, way: Way) -> TorchEngine:
    """The weights of `checkpoint` run by `way`, with the geometry and schedule of `manifest`."""
    engine = TorchEngine(checkpoint, manifest)
    model = checkpoint.build_model().to(way.dtype)
    engine.denoiser = TorchLoopDenoiser(model, way)
    return engine
