"""Passes on a card: a KV cache on the device, and one context for each length of it.

What a pass reads and writes lies at one address for as long as the cache has its size, so that TensorRT
captures a pass over so many cached frames once, as a CUDA graph, and replays it from then on. A pass by
itself is waited for; those of a block that is queued whole (`device_queue.py`) are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from asd_rt.backends.base import FloatArray
from asd_rt.backends.cuda import Binding
from asd_rt.backends.device_memory import DeviceArray
from asd_rt.errors import BackendError
from asd_rt.kv_cache import Move
from asd_rt.rope import rope_table
from asd_rt.schedule import CLEAN_TIMESTEP, Step

if TYPE_CHECKING:
    from asd_rt.backends.device import DeviceContext, DeviceEngine
    from asd_rt.backends.device_codec import DeviceCodecStream
    from asd_rt.backends.device_queue import DeviceQueue

# numpy has no bfloat16: its bits are read as integers.
_KV_TYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": np.uint16}


@dataclass(slots=True)
class _Pass:
    """A pass of so many frames behind so many: its context, and where it is read from and written to."""

    context: DeviceContext
    latents: DeviceArray
    rope: dict[str, DeviceArray]
    flow: int
    frames: range = range(0)  # that `rope` holds


class DeviceDenoiser:
    """See `asd_rt.backends.base.Denoiser`."""

    def __init__(self, engine: DeviceEngine) -> None:
        self._engine, self.cuda = engine, engine.cuda
        model = engine.manifest.model
        self._model, self._layers = model, range(model.num_layers)
        self._names = [f"{kind}.{i}" for i in self._layers for kind in "kv"]
        dtype = engine.manifest.parts["denoiser"].outputs["new_k.0"].dtype
        if dtype not in _KV_TYPES:
            raise BackendError(
                f"{engine.path}: expected keys and values of {', '.join(_KV_TYPES)}, found {dtype}"
            )
        self._kv_dtype: np.dtype[Any] = np.dtype(_KV_TYPES[dtype])
        self._buffers: dict[str, DeviceArray] = {}
        self._cache: dict[str, int] = {}
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._has_prompt = False
        self._modulations: dict[float, int] = {}
        self._timestep: float | None = None  # whose modulation passes read now
        self._sigmas: dict[tuple[float, float], DeviceArray] = {}
        self._queue: DeviceQueue | None = None
        self._geometry: tuple[int, int, int, int] | None = None

    def prepare(self, batch: int, latent_hw: tuple[int, int], capacity_frames: int) -> None:
        fixed = self._engine.manifest.latent_hw
        if fixed is not None and tuple(latent_hw) != fixed:
            raise BackendError(
                f"{self._engine.path}: is fixed to latents of {fixed}, found {tuple(latent_hw)}"
            )
        if batch != 1:
            raise BackendError(
                f"{self._engine.path}: serves one video at a time on a card, found a batch of {batch}"
            )
        self._has_prompt = False
        geometry = (batch, *latent_hw, capacity_frames)
        if geometry == self._geometry:
            return
        self._forget()
        self._frame_tokens = (latent_hw[0] // 2) * (latent_hw[1] // 2)
        self._token_bytes = self._model.dim * self._kv_dtype.itemsize
        size = capacity_frames * self._frame_tokens * self._token_bytes
        for name in self._names:
            self._cache[name] = self.cuda.allocate(size)
        self._geometry = geometry

    def _forget(self) -> None:
        """Let go of the cache and of all passes over it, after they have run."""
        self.cuda.synchronize()
        for made in self._passes.values():
            made.context.release()
            made.latents.release()
            for table in made.rope.values():
                table.release()
            self.cuda.free(made.flow)
        for address in self._cache.values():
            self.cuda.free(address)
        self._passes, self._cache, self._geometry = {}, {}, None

    def release(self) -> None:
        """Free all memory; the denoiser is of no use afterwards."""
        if self.cuda.closed:  # which freed it
            return
        self._forget()
        if self._queue is not None:
            self._queue.release()
        for buffer in (*self._buffers.values(), *self._sigmas.values()):
            buffer.release()
        for address in self._modulations.values():
            self.cuda.free(address)
        self._buffers, self._modulations, self._has_prompt = {}, {}, False
        self._sigmas, self._queue = {}, None

    def _buffer(self, name: str) -> DeviceArray:
        return self._buffers.setdefault(name, DeviceArray(self.cuda))

    def _prompt(self) -> dict[str, Binding]:
        """Where a prompt's keys and values lie."""
        shape = (1, self._model.text_len, self._model.dim)
        size = self._model.text_len * self._token_bytes
        return {f"prompt_{n}": (self._buffer(f"prompt_{n}").room(size), shape) for n in self._names}

    def set_prompt(self, context: FloatArray) -> None:
        part = self._engine.part("prompt").usual
        given = self._buffer("context").put(context.astype(np.float32, copy=False))
        part.set_inputs({"context": given})
        part.set_outputs({name: address for name, (address, _) in self._prompt().items()})
        part.run()
        self._has_prompt = True

    def _modulation(self) -> Binding:
        """Where passes read the modulation of their timestep."""
        shape = (6 * self._model.num_layers + 2, self._model.dim)
        return self._buffer("modulation").room(4 * int(np.prod(shape))), shape

    def _set_timestep(self, timestep: float) -> None:
        """Put the modulation of `timestep`, computed once, where passes read it."""
        if timestep == self._timestep:
            return
        address, shape = self._modulation()
        size = 4 * int(np.prod(shape))
        if timestep not in self._modulations:
            part, made = self._engine.part("time").usual, self.cuda.allocate(size)
            given = np.full(1, timestep, np.float32)
            part.set_inputs({"timestep": self._buffer(f"timestep {timestep}").put(given)})
            part.set_outputs({"modulation": made})
            part.run()
            self._modulations[timestep] = made
        self.cuda.copy(address, self._modulations[timestep], size)
        self._timestep = timestep

    def _pass(self, count: int, past_frames: int, latent_hw: tuple[int, int]) -> _Pass:
        """The pass of `count` frames behind `past_frames`, with everything bound."""
        key = (count, past_frames)
        if key not in self._passes:
            model, tokens = self._model, count * self._frame_tokens
            past = past_frames * self._frame_tokens
            behind = past * self._token_bytes
            names = ("rope_cos", "rope_sin")
            context = self._engine.part("denoiser").new_context()
            sizes = (count, model.in_dim, *latent_hw), (count, model.out_dim, *latent_hw)
            made = self._passes[key] = _Pass(
                context,
                DeviceArray(self.cuda),
                {name: DeviceArray(self.cuda) for name in names},
                self.cuda.allocate(4 * int(np.prod(sizes[1]))),
            )
            table = (tokens, model.head_dim // 2)
            context.set_inputs(
                {"latents": (made.latents.room(4 * int(np.prod(sizes[0]))), (1, *sizes[0]))}
                | {"modulation": self._modulation()}
                | {n: (made.rope[n].room(4 * int(np.prod(table))), table) for n in names}
                | self._prompt()
                | {f"past_{n}": (self._cache[n], (1, past, model.dim)) for n in self._names}
            )
            context.set_outputs(
                {"flow": made.flow}
                | {f"new_{name}": self._cache[name] + behind for name in self._names}
            )
        return self._passes[key]

    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        made = self._ready(timestep, frames, past_frames)
        made.latents.put(latents.astype(np.float32, copy=False))
        made.context.replay()
        flow = np.empty((1, len(frames), self._model.out_dim, *latents.shape[3:]), np.float32)
        self.cuda.download(flow, made.flow)
        return flow

    def _ready(self, timestep: float, frames: range, past_frames: int) -> _Pass:
        """A pass whose context can be run once its latents are there."""
        if self._geometry is None or not self._has_prompt:
            raise BackendError("denoise needs prepare and set_prompt first")
        _, rows, columns, capacity = self._geometry
        if past_frames + len(frames) > capacity:
            raise BackendError(
                f"{len(frames)} frames behind {past_frames} do not fit into {capacity} slots"
            )
        self._set_timestep(timestep)
        made = self._pass(len(frames), past_frames, (rows, columns))
        if made.frames != frames:
            tables = rope_table(self._model.head_dim, frames, rows // 2, columns // 2)
            for buffer, table in zip(made.rope.values(), tables, strict=True):
                buffer.put(table)
            made.frames = frames
        return made

    def queue_passes(
        self,
        noise: Sequence[FloatArray],
        steps: Sequence[Step],
        frames: range,
        past_frames: int,
        marks: Sequence[Any],
    ) -> int:
        """Queue the denoising passes of a block; what lies between two of them is computed on the card.

        Args:
            noise, steps, frames, past_frames: see `asd_rt.backends.overlap.BlockQueue`.
            marks: events to be recorded, one behind each pass.

        Returns:
            where the clean latents will be; they stay until the next call.
        """
        part, shape, size = self._engine.part("step").usual, noise[0].shape, noise[0].nbytes
        clean = self._buffer("clean").room(size)
        for i, step in enumerate(steps):
            made = self._ready(step.timestep, frames, past_frames)
            x = made.latents.put(noise[0]) if not i else (made.latents.room(size), shape)
            made.context.replay()
            self.cuda.record(marks[i], self.cuda.stream)
            # The result of the last step is one without noise.
            is_last = i + 1 == len(steps)
            fresh = x if is_last else self._buffer(f"noise{i + 1}").put(noise[i + 1])
            sigmas = self._sigma_pair(step.sigma, 0.0 if is_last else steps[i + 1].sigma)
            part.set_inputs(
                {"latents": x, "flow": (made.flow, shape), "noise": fresh, "sigmas": sigmas}
            )
            # Not in place: TensorRT promises nothing where an input and an output share memory.
            target = clean if is_last else self._buffer("next").room(size)
            part.set_outputs({"next": target})
            part.run()
            if not is_last:
                self.cuda.copy(x[0], target, size)
        return clean

    def _sigma_pair(self, sigma: float, following: float) -> Binding:
        """Where the noise levels of a step and of the one behind it lie."""
        key = sigma, following
        if key not in self._sigmas:
            self._sigmas[key] = DeviceArray(self.cuda)
            self._sigmas[key].put(np.array(key, np.float32))
        return self._sigmas[key].room(8), (2,)

    def queue_clean(
        self, clean: int, shape: tuple[int, ...], frames: range, past_frames: int
    ) -> None:
        """Queue the cache pass over the clean latents that lie at `clean` on the card."""
        made, size = self._ready(CLEAN_TIMESTEP, frames, past_frames), 4 * int(np.prod(shape))
        self.cuda.copy(made.latents.room(size), clean, size)
        made.context.replay()

    def queue(self, stream: DeviceCodecStream) -> DeviceQueue:
        """The queue of blocks that `stream` decodes; the denoiser's own, for one stream at a time."""
        from asd_rt.backends.device_queue import DeviceQueue

        if self._queue is None or self._queue.stream is not stream:
            if self._queue is not None:
                self._queue.release()
                self._queue = None
            self._queue = DeviceQueue(self, stream)
        return self._queue

    can_join = False

    def denoise_joined(
        self,
        clean: FloatArray,
        noisy: FloatArray,
        timestep: float,
        frames: range,
        past_frames: int,
        hidden: Sequence[int],
    ) -> FloatArray:
        raise BackendError(f"{self._engine.path}: there is no joined pass on a card")

    def move(self, moves: Sequence[Move]) -> None:
        size = self._frame_tokens * self._token_bytes
        for move in moves:
            for base in self._cache.values():
                self.cuda.copy(
                    base + move.target * size, base + move.source * size, move.frames * size
                )

    def read_cache(self, layer: int, slots: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        shape = (self._frame_tokens, self._model.num_heads, self._model.head_dim)
        size = self._frame_tokens * self._token_bytes

        def read(base: int) -> FloatArray:
            frames = [np.empty(shape, self._kv_dtype) for _ in slots]
            for frame, slot in zip(frames, slots, strict=True):
                self.cuda.download(frame, base + slot * size)
            whole = np.concatenate(frames)[None]
            if whole.dtype == np.uint16:  # the upper half of a float32
                return (whole.astype(np.uint32) << 16).view(np.float32)
            return whole.astype(np.float32)

        return read(self._cache[f"k.{layer}"]), read(self._cache[f"v.{layer}"])
