"""The torch engine: `train.model` behind the runtime's own protocol, so that both run the very same loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asd_rt.backends.base import Denoiser, FloatArray
from asd_rt.errors import BackendError, EngineError
from asd_rt.kv_cache import Move, joined_mask
from asd_rt.manifest import Manifest
from train.checkpoint import Checkpoint
from train.codec import PATCH, LinearCodec
from train.model import KeyValue, WanModel, make_rope


class TorchDenoiser:
    """See `asd_rt.backends.base.Denoiser`; float32, the plainest possible use of `WanModel.denoise`."""

    def __init__(self, model: WanModel) -> None:
        self.model = model
        self._cache: list[KeyValue] = []
        self._prompt: list[KeyValue] = []
        self._token_hw = (0, 0)

    def prepare(self, batch: int, latent_hw: tuple[int, int], capacity_frames: int) -> None:
        config = self.model.config
        self._token_hw = (latent_hw[0] // 2, latent_hw[1] // 2)
        tokens = capacity_frames * self._frame_tokens
        shape = (tokens, batch, config.num_heads, config.head_dim)
        self._cache = [
            KeyValue(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)
        ]
        self._prompt = []

    @property
    def _frame_tokens(self) -> int:
        return self._token_hw[0] * self._token_hw[1]

    @torch.inference_mode()
    def set_prompt(self, context: FloatArray) -> None:
        self._prompt = self.model.embed_prompt(torch.from_numpy(context))

    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        times = torch.full((1, len(frames)), timestep)
        return self._pass(latents, times, frames, past_frames, None)

    can_join = True

    def denoise_joined(
        self,
        clean: FloatArray,
        noisy: FloatArray,
        timestep: float,
        frames: range,
        past_frames: int,
        hidden: Sequence[int],
    ) -> FloatArray:
        size = len(frames) // 2
        times = torch.tensor([[0.0] * size + [timestep] * size])
        mask = torch.from_numpy(joined_mask(size, past_frames, hidden, self._frame_tokens))
        latents = np.concatenate([clean, noisy], axis=1)
        return self._pass(latents, times, frames, past_frames, mask)[:, size:]

    @torch.inference_mode()
    def _pass(
        self,
        latents: FloatArray,
        times: Tensor,
        frames: range,
        past_frames: int,
        mask: Tensor | None,
    ) -> FloatArray:
        if not self._prompt:
            raise BackendError("denoise needs prepare and set_prompt first")
        past = past_frames * self._frame_tokens
        rope = make_rope(self.model.config, frames, self._token_hw)
        prefix = [KeyValue(layer.k[:past], layer.v[:past]) for layer in self._cache]
        x = torch.from_numpy(np.ascontiguousarray(latents))
        time = self.model.embed_time(times)
        flow, new = self.model.denoise(x, time, self._prompt, rope, prefix, mask)
        end = past + len(frames) * self._frame_tokens
        for layer, kv in zip(self._cache, new, strict=True):
            layer.k[past:end], layer.v[past:end] = kv
        return flow.numpy()

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

        def read(buffer: Tensor) -> FloatArray:
            return np.ascontiguousarray(buffer[tokens].transpose(0, 1).numpy())

        return read(self._cache[layer].k), read(self._cache[layer].v)


class TorchCodecStream:
    """See `asd_rt.backends.base.CodecStream`; of a linear codec, which remembers nothing."""

    def __init__(self, codec: LinearCodec, part: str, latent_hw: tuple[int, int]) -> None:
        self._codec, self._part = codec, part
        self.frame_hw = (latent_hw[0] * PATCH, latent_hw[1] * PATCH)

    @torch.inference_mode()
    def step(self, given: FloatArray, made: FloatArray, first: bool) -> None:
        x = torch.from_numpy(given)
        made[:] = self._codec(x) if self._part == "decoder" else self._codec.encode((x + 1) / 2)


class TorchEngine:
    """See `asd_rt.backends.base.Engine`."""

    def __init__(
        self, checkpoint: Checkpoint, manifest: Manifest, model: WanModel | None = None
    ) -> None:
        """An engine of `checkpoint` with the cache geometry, plan and schedule of `manifest`.

        Args:
            checkpoint: whose weights are run.
            manifest: of the engine that this one stands in for.
            model: `checkpoint.build_model()` where that is built already.
        """
        self.path = Path(checkpoint.name)
        self.manifest = manifest
        self._checkpoint = checkpoint
        self.denoiser: Denoiser = TorchDenoiser(model or checkpoint.build_model())

    @property
    def device(self) -> str:
        return f"torch {torch.__version__}, {torch.get_num_threads()} threads"

    def encode_prompt(self, tokens: NDArray[np.int64]) -> FloatArray:
        if self._checkpoint.table is None:
            raise EngineError(f"checkpoint {self.path}: has no text encoder")
        return self._checkpoint.table[torch.from_numpy(tokens)].numpy()

    def codec_stream(self, part: str, latent_hw: tuple[int, int]) -> TorchCodecStream:
        if self._checkpoint.codec is None:
            raise EngineError(f"checkpoint {self.path}: has no codec of its own")
        return TorchCodecStream(self._checkpoint.codec, part, latent_hw)

    def close(self) -> None:
        """Nothing to release."""
