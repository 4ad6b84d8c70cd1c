"""All parts of an engine as modules, each with the names and shapes of its tensors (docs/engine.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asd_rt.errors import ConfigError
from export.conditions import PromptPart, TimePart
from export.denoiser import DenoiserPart, JoinedPart
from export.lowering import LOWERINGS, Lowering
from export.quantize import Scheme
from train.checkpoint import Checkpoint
from train.codec import LinearCodec
from train.model import WanModel

# Type of products, attention, keys and values. Graphs of bf16 and int8 engines are float32, but for quantised
# products; a runtime computes them in bfloat16 (OpenVINO on a CPU).
KV_TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.float32,
    "int8": torch.float32,
}
# TensorRT computes in what the graph says.
PLAN_TYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float16,
    "fp8": torch.float16,
}


@dataclass(frozen=True, slots=True, eq=False)
class PartModule:
    """A part ready for export.

    Attributes:
        module: its `forward` takes `inputs` in their order and returns `outputs` in theirs.
        inputs, outputs: (dtype, shape) by name; a shape holds sizes and the symbols of docs/engine.md.
        stored: how many of the last inputs are weights, which `forward` takes as *args.
    """

    module: nn.Module
    inputs: Mapping[str, TensorShape]
    outputs: Mapping[str, TensorShape]
    stored: int = 0


TensorShape = tuple[torch.dtype, tuple[int | str, ...]]


class TextPart(nn.Module):
    """Token ids int64 [B, L] -> context [B, L, text_dim]."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.table)


class StepPart(nn.Module):
    """What lies between two passes: noisy latents and their flow -> the input of the next pass.

    The runtime computes it on the host where that has the latents anyway; on a card it runs in the passes'
    stream, so that a block need not be waited for before it is done.
    """

    def forward(self, latents: Tensor, flow: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Tensors [1, F, C, h, w]; `sigmas` [2]: of the pass and of the next, 0 = there is none."""
        clean = latents - sigmas[:1] * flow
        return (1 - sigmas[1:]) * clean + sigmas[1:] * noise


class EncoderPart(nn.Module):
    """Frames in -1..1 -> latents."""

    def __init__(self, codec: LinearCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, frames: Tensor) -> Tensor:
        return self.codec.encode((frames + 1) / 2)


def engine_parts(
    checkpoint: Checkpoint,
    model: WanModel,
    precision: str,
    latent_hw: tuple[int, int] | None,
    lowering: Lowering,
    scheme: Scheme | None = None,
) -> dict[str, PartModule]:
    """All parts of an engine, by name.

    Args:
        checkpoint: what to export.
        model: `checkpoint.build_model()`.
        precision: one of KV_TYPES, or of PLAN_TYPES for a plan.
        latent_hw: the one latent size of the engine, None = any.
        lowering: one of LOWERINGS.
        scheme: which products are computed in another way.

    Raises:
        ConfigError: another precision.
    """
    kinds = PLAN_TYPES if lowering is LOWERINGS["tensorrt"] else KV_TYPES
    if precision not in kinds:
        raise ConfigError(f"precision {precision} cannot be exported; use {' or '.join(kinds)}")
    kv, f32 = kinds[precision], torch.float32
    c = model.config
    height, width = latent_hw or ("h", "w")
    tokens, rows = "T", 6 * c.num_layers + 2
    latents: TensorShape = (f32, (1, "F", c.in_dim, height, width))
    flow: TensorShape = (f32, (1, "F", c.out_dim, height, width))
    rope: TensorShape = (f32, (tokens, c.head_dim // 2))

    def layers(prefix: str, length: int | str) -> dict[str, TensorShape]:
        shape = (1, length, c.dim)
        return {f"{prefix}_{kind}.{i}": (kv, shape) for i in range(c.num_layers) for kind in "kv"}

    def inputs(modulation: tuple[int | str, ...], **more: TensorShape) -> dict[str, TensorShape]:
        given = {"latents": latents, "modulation": (f32, modulation), "rope_cos": rope}
        held = layers("prompt", c.text_len) | layers("past", "P")
        return given | {"rope_sin": rope} | more | held

    made = {"flow": flow} | layers("new", tokens)
    denoiser = DenoiserPart(model, kv, lowering, scheme)
    # Where every byte of a small network's file counts; elsewhere a runtime has its own way with weights.
    small = precision == "int8" and lowering is LOWERINGS["onnxruntime"]
    parts = {
        "denoiser": PartModule(denoiser, inputs((rows, c.dim)), made),
        "time": PartModule(
            TimePart(model), {"timestep": (f32, (1,))}, {"modulation": (f32, (rows, c.dim))}
        ),
        "prompt": PartModule(
            PromptPart(model, kv, int8=small),
            {"context": (f32, (1, c.text_len, c.text_dim))},
            layers("prompt", c.text_len),
        ),
    }
    if not lowering.cpu_only:
        given = dict.fromkeys(("latents", "flow", "noise"), latents)
        parts["step"] = PartModule(StepPart(), given | {"sigmas": (f32, (2,))}, {"next": latents})
    if lowering.joined:
        mask: TensorShape = (torch.bool, (tokens, "S"))
        parts["joined"] = PartModule(
            JoinedPart(denoiser), inputs((rows, "F", 1, c.dim), mask=mask), made
        )
    if checkpoint.table is not None:
        parts["text"] = PartModule(
            TextPart(checkpoint.table),
            {"tokens": (torch.int64, ("B", c.text_len))},
            {"context": (f32, ("B", c.text_len, c.text_dim))},
        )
    if checkpoint.codec is not None:
        size = tuple(4 * n for n in latent_hw) if latent_hw else ("rows", "columns")
        frames: TensorShape = (f32, ("B", "F", 3, *size))
        latents = (f32, ("B", *latents[1][1:]))
        parts["decoder"] = PartModule(checkpoint.codec, {"latents": latents}, {"frames": frames})
        parts["encoder"] = PartModule(
            EncoderPart(checkpoint.codec), {"frames": frames}, {"latents": latents}
        )
    for name, part in parts.items():
        part.module.eval().requires_grad_(False)
        if small and name in ("denoiser", "joined", "prompt", "time"):
            _round_matrices(part.module)
    return parts


def _round_matrices(module: nn.Module) -> None:
    """Round the matrices that int8 leaves alone to float16, in which they can then be stored."""
    for parameter in module.parameters():
        if parameter.ndim == 2 and parameter.dtype == torch.float32:
            rounded = parameter.data.half().float()
            if bool(rounded.isfinite().all()):
                parameter.data = rounded
