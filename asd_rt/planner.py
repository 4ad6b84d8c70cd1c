"""Memory of a video before any of it is allocated: what it needs, by network, precision, size and length.

KV cache, prompt and decoder state are counted exactly. Weights and activations are those of the runtimes'
own ways: ONNX Runtime holds all scores of an attention in float32; OpenVINO computes them piece by piece in
bfloat16, but keeps the keys and values of every layer until a pass ends. Their factors were fitted to runs of
4, 8 and 30 layers of the 1.3B shape, up to 4680 tokens over 9360; docs/engine.md says how well plans held.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import prod

import numpy as np

from asd_rt.config import CacheConfig, ModelConfig
from asd_rt.decoding import codec_memory
from asd_rt.manifest_schema import Manifest, TensorSpec

LARGE_PARAMETERS = 500_000_000
USUAL_LATENT_HW = (60, 104)  # of Wan2.1 at 480x832, for engines that fix none
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
# Of an int8 network; below, OpenVINO loses more between products than it gains in them.
SMALL_PARAMETERS = 8e6
ORT_BYTES, OPENVINO_BYTES = 80_000_000, 240_000_000  # programs and libraries
FOLDED_BYTES = 8  # that OpenVINO takes for a weight of a small network, at each size of pass
STATE_PREFIX = "state."
_SCALED = re.compile(r"(\d*)([A-Za-z]\w*)")


def runtime_of(backend: str, precision: str, model: ModelConfig) -> str:
    """What runs the passes of an engine: onnxruntime, openvino or tensorrt."""
    if backend != "onnx":
        return "tensorrt"
    a_layer = 8 * model.dim**2 + 2 * model.dim * model.ffn_dim
    large = model.num_layers * a_layer >= SMALL_PARAMETERS
    halved = precision == "bf16" or (precision == "int8" and large)
    return "openvino" if halved else "onnxruntime"


def is_large(model: ModelConfig) -> bool:
    """Whether a network is so large that nothing of it may be held twice."""
    return pass_parameters(model) + prompt_parameters(model) >= LARGE_PARAMETERS


def pass_parameters(model: ModelConfig) -> int:
    """Weights that every pass reads."""
    block = 6 * model.dim**2 + 2 * model.dim * model.ffn_dim
    return model.num_layers * block + 4 * model.dim * (model.in_dim + model.out_dim)


def prompt_parameters(model: ModelConfig) -> int:
    """Weights that a new prompt reads."""
    dim = model.dim
    return model.text_dim * dim + dim**2 + 2 * model.num_layers * dim**2


def time_parameters(model: ModelConfig) -> int:
    """Weights that a new timestep reads."""
    return model.dim * (model.freq_dim + 7 * model.dim + 6 * model.num_layers + 2)


@dataclass(frozen=True)
class Video:
    """What is to be generated, by what.

    Attributes:
        model, cache, precision, backend: of the engine.
        latent_hw: latent (rows, columns), both even.
        frames: latent frames.
        batch: videos at once.
        joined: with joined passes.
        dumped: the cache is read out at the end, in float32.
        state: tensors that the decoder keeps from block to block, by name.
        decoding: latent size -> bytes that the decoder needs beside them while it runs; None = nothing.
    """

    model: ModelConfig
    cache: CacheConfig
    precision: str
    latent_hw: tuple[int, int]
    frames: int
    backend: str = "onnx"
    batch: int = 1
    joined: bool = False
    dumped: bool = False
    state: Mapping[str, TensorSpec] = field(default_factory=dict)
    decoding: Callable[[tuple[int, int]], int] | None = None

    @property
    def frame_tokens(self) -> int:
        return (self.latent_hw[0] // 2) * (self.latent_hw[1] // 2)

    @property
    def capacity_frames(self) -> int:
        """Slots of a cache buffer."""
        block = self.cache.block_frames
        slots = self.cache.window_frames or -(-self.frames // block) * block
        return slots + (block if self.joined else 0)

    @property
    def on_openvino(self) -> bool:
        return runtime_of(self.backend, self.precision, self.model) == "openvino"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what they are for.

    Attributes:
        weights: of all parts, as the runtime holds them.
        cache: keys and values of the past and of the current block.
        prompt: keys and values of the prompt.
        state: of the decoder, from block to block.
        activations: what a pass, or the decoder, needs while it runs.
        results: the cache that is read out.
        program: the process itself.
        mapped: weights that are seen through their file; the system takes that memory back when it is short.
    """

    weights: int
    cache: int
    prompt: int
    state: int
    activations: int
    results: int
    program: int
    mapped: int

    @property
    def total(self) -> int:
        """Peak of resident memory."""
        return sum(self.to_json().values())

    @property
    def needed(self) -> int:
        """What must be available: all but the mapped file."""
        return self.total - self.mapped

    def to_json(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def plan_memory(video: Video) -> MemoryPlan:
    """What `video` needs."""
    model, openvino = video.model, video.on_openvino
    half = openvino or video.precision == "fp16" or video.backend != "onnx"
    slots = video.capacity_frames * video.frame_tokens
    width = 2 if half else 4
    values = video.batch * 2 * model.num_layers * model.dim
    weights, mapped = _weights(video)
    return MemoryPlan(
        weights=weights,
        cache=values * slots * width,
        prompt=values * model.text_len * width,
        state=sum(_state_bytes(spec, video) for spec in video.state.values()),
        activations=max(_activations(video), _decoding(video)),  # one after the other
        results=4 * values * slots if video.dumped else 0,
        program=OPENVINO_BYTES if openvino else ORT_BYTES,
        mapped=mapped,
    )


def _weights(video: Video) -> tuple[int, int]:
    """(bytes held, bytes mapped) of the weights."""
    model, large = video.model, is_large(video.model)
    passes, width = pass_parameters(model), WEIGHT_BYTES[video.precision]
    small = 4 * time_parameters(model)
    prompt = 4 * prompt_parameters(model)  # a large network's is let go, see _activations
    if video.backend != "onnx":
        return width * passes + 2 * prompt_parameters(model) + small, 0
    if not large:
        small += prompt
    kinds = 2 if video.joined else 1
    if not video.on_openvino:
        return 4 * passes * kinds + small, 0
    if large:
        return width * passes + small, width * passes
    cache = video.cache
    sizes = -(-cache.window_frames // cache.block_frames) if cache.window_frames else 1
    return FOLDED_BYTES * passes * kinds * sizes + small, width * passes


def _activations(video: Video) -> int:
    """The most that is alive at once within a pass, or while a large network reads a prompt."""
    model, dim = video.model, video.model.dim
    own = video.cache.block_frames * video.frame_tokens * (2 if video.joined else 1)
    past = max(0, video.capacity_frames * video.frame_tokens - own)
    mask = own * (past + own) if video.joined else 0
    if video.on_openvino or video.backend != "onnx":
        # Values are a view of a layer's product of queries, keys and values, which therefore stays.
        kept = 4 * model.num_layers * own * dim if video.on_openvino else 0
        return 2 * (kept + own * (2 * model.ffn_dim + 7 * dim) + 3 * past * dim) + mask
    scores = model.num_heads * own * (past + own)
    run = 4 * (scores + own * (2 * model.ffn_dim + 17 * dim) + 5 * past * dim) + 5 * mask
    if not is_large(model):
        return run
    read = 4 * (prompt_parameters(model) + 2 * model.num_layers * model.text_len * dim)
    return max(run, read)


def _decoding(video: Video) -> int:
    return 0 if video.decoding is None else video.decoding(video.latent_hw)


def _state_bytes(spec: TensorSpec, video: Video) -> int:
    """Bytes of a decoder's tensor; in its shape "h" is latent rows, "8w" 8 times the columns."""
    sizes = {"h": video.latent_hw[0], "w": video.latent_hw[1], "B": video.batch}
    shape = []
    for entry in spec.shape:
        match = _SCALED.fullmatch(entry) if isinstance(entry, str) else None
        size = entry if match is None else int(match[1] or 1) * sizes.get(match[2], 1)
        shape.append(size if isinstance(size, int) else 1)
    return prod(shape) * np.dtype(spec.dtype).itemsize


def video_of(
    manifest: Manifest,
    frames: int,
    latent_hw: tuple[int, int],
    batch: int = 1,
    joined: bool = False,
    dumped: bool = False,
) -> Video:
    """A video of `frames` latent frames by the engine of `manifest`."""
    decoder = manifest.parts.get("decoder")
    state = {} if decoder is None else decoder.inputs
    return Video(
        model=manifest.model,
        cache=manifest.cache,
        precision=manifest.precision,
        latent_hw=latent_hw,
        frames=frames,
        backend=manifest.backend,
        batch=batch,
        joined=joined,
        dumped=dumped,
        state={name: spec for name, spec in state.items() if name.startswith(STATE_PREFIX)},
        decoding=None
        if decoder is None
        else lambda hw: codec_memory(manifest, "decoder", hw).working_bytes,
    )
