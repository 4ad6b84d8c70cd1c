"""The text encoder of a bundle: a graph, its weights and its tokenizer, made from a source tensor by tensor.

Its weights are stored as float32, float16 or int8 in a file of their own, and computed with in float32, so
that no activation is rounded. That of a plan is compiled from the same graph, after the gate, and holds its
weights; it may be asked to stay a graph, which runs on the CPU beside the card.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asd_rt.config import ModelConfig
from asd_rt.engines import list_engines
from asd_rt.errors import ConfigError, EngineError
from asd_rt.machine import available_memory_bytes, usable_cores
from asd_rt.manifest import Part, TensorSpec, read_manifest
from asd_rt.progress import Progress
from asd_rt.text_encoder import open_text_session
from export.bundle import content_name, is_added, replace_parts, scratch_folder, write_part
from export.lowering import LOWERINGS
from export.metrics import relative_l2
from export.onnx import export_part, serialize
from export.parts import PartModule, TensorShape
from export.plans import compile_added
from export.umt5 import Umt5Part, buckets_by_offset, encode
from export.umt5_source import Umt5Source
from export.umt5_storage import (
    StoredWeights,
    TensorFile,
    read_from,
    store,
    stored_tensors,
)

BUDGET = 1e-3  # relative L2 of the graph against torch with the same stored weights
MAX_TOKENS, USUAL_TOKENS = 512, 64  # of Wan's prompts
BUILDER_BYTES = 18  # a weight, at the peak: TensorRT holds it in float32, several times
ON_CPU = "keep the text encoder a graph, which runs on the CPU: --text-target onnx"
log = logging.getLogger(__name__)


def check_text(source: Umt5Source, model: ModelConfig) -> None:
    """Raise ConfigError when the embeddings of `source` are not what a network of `model` reads."""
    if source.config.d_model != model.text_dim:
        raise ConfigError(
            f"--text-encoder {source.name}: gives {source.config.d_model} numbers a token, the denoiser "
            f"reads {model.text_dim} (text_dim); take the text encoder that the denoiser was trained with"
        )


def check_text_plan(precision: str | None) -> None:
    """Raise ConfigError for a precision of weights that a plan of a text encoder cannot hold."""
    if precision == "int8":
        raise ConfigError(
            "--text-precision int8: TensorRT takes int8 weights for products of int8 alone, and this encoder "
            f"computes in float32; use --text-precision fp16, or {ON_CPU}"
        )


def add_text_encoder(
    source: Umt5Source,
    precision: str | None,
    engines: list[Path],
    force: bool,
    target: str | None = None,
) -> None:
    """Make the text encoder a part of each of `engines`, all in one folder; they share files of a graph.

    An engine that has it already is left alone.

    Args:
        source: `open_umt5`, for these engines by `check_text`.
        precision: of the weights' storage, one of PRECISIONS; None = that of the source, without loss.
        engines: engine files.
        force: write it again even where it is there.
        target: "onnx" keeps that of a plan as a graph; None = compile it.

    Raises:
        ConfigError: this machine has not the memory to compile it.
        EngineError: it cannot be written or compiled, or is too far from the reference.
        CheckpointError: weights that are not finite, or too large for float16.
    """
    precision = precision or _usual_precision(source)
    plans = [] if target == "onnx" else [e for e in engines if read_manifest(e).backend != "onnx"]
    for engine in plans:
        _add_plan(source, precision, engine, force)
    engines = [engine for engine in engines if engine not in plans]
    told: dict[str, Any] = {
        "name": source.name,
        "sha256": source.sha256,
        "precision": precision,
        "parts": ["text", "text_weights", "tokenizer"],
    }
    current = [] if force else [engine for engine in engines if is_added(engine, "text", told)]
    stale = [engine for engine in engines if engine not in current]
    for engine in current:
        log.info("%s: its text encoder is up to date", engine)
    if not stale:
        return
    folder = stale[0].parent
    others = [] if force else [engine for engine in list_engines(folder) if engine not in engines]
    donor = next((e for e in (*current, *others) if is_added(e, "text", told)), None)
    with scratch_folder(folder) as scratch:
        if donor is not None:
            made = read_manifest(donor)
            parts = {name: made.parts[name] for name in told["parts"]}
            parity = made.parity["text"]
        else:
            parts, parity = _write(source, precision, scratch)
        for engine in stale:
            model = read_manifest(engine).model
            tokenizer = {"kind": "umt5", "max_tokens": min(MAX_TOKENS, model.text_len)}
            replace_parts(engine, "text", told, parts, parity, scratch, tokenizer=tokenizer)
            log.info("%s: wrote its text encoder, %.1f MB", engine,
                     sum(part.bytes for part in parts.values()) / 1e6)  # fmt: skip


def _add_plan(source: Umt5Source, precision: str, engine: Path, force: bool) -> None:
    """Make the text encoder a plan beside the other plans of `engine`."""
    manifest, told = read_manifest(engine), _told_of_plan(source, precision)
    if not force and is_added(engine, "text", told):
        log.info("%s: its text encoder is up to date", engine)
        return
    _check_memory(source)
    longest = min(MAX_TOKENS, manifest.model.text_len)
    ranges = {"B": (1, 1, 1), "L": (1, min(USUAL_TOKENS, longest), longest)}
    with scratch_folder(engine.parent) as scratch:
        parts, parity = _write(source, precision, scratch)
        weights = parts.pop("text_weights")
        try:
            parts |= compile_added(scratch, manifest, "text", {"text": parts["text"]}, ranges)
        except EngineError as error:
            raise EngineError(f"{error}; {ON_CPU}") from error
        (scratch / weights.file).unlink()
        tokenizer = {"kind": "umt5", "max_tokens": longest}
        replace_parts(engine, "text", told, parts, parity, scratch, tokenizer=tokenizer)
    log.info("%s: wrote its text encoder, %.1f MB", engine,
             sum(part.bytes for part in parts.values()) / 1e6)  # fmt: skip


def _usual_precision(source: Umt5Source) -> str:
    return "fp16" if source.is_half else "fp32"


def _told_of_plan(source: Umt5Source, precision: str) -> dict[str, Any]:
    """What the manifest of a plan says of its text encoder."""
    return {
        "name": source.name,
        "sha256": source.sha256,
        "precision": precision,
        "parts": ["text", "text_log", "tokenizer"],
    }


def check_text_memory(
    source: Umt5Source, precision: str | None, plans: Sequence[Path], force: bool
) -> None:
    """Refuse to compile what this machine has not the memory for, before the engines are built.

    Args:
        source, precision, force: as of `add_text_encoder`.
        plans: engine files that are to get it; those that have it already need no memory.

    Raises:
        ConfigError: with the memory that it takes and what is free.
    """
    try:
        _check_memory(source)
    except ConfigError:
        told = _told_of_plan(source, precision or _usual_precision(source))
        if force or not all(is_added(plan, "text", told) for plan in plans):
            raise


def _check_memory(source: Umt5Source) -> None:
    """Refuse to compile what this machine has not the memory for.

    Raises:
        ConfigError: with both figures.
    """
    weights = sum(prod(shape) for shape in source.config.shapes().values())
    needed, free = BUILDER_BYTES * weights, available_memory_bytes()
    if free is not None and needed > free:
        raise ConfigError(
            f"--text-encoder {source.name}: to compile its {weights / 1e9:.1f} billion weights takes about "
            f"{needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; {ON_CPU}"
        )


def _write(
    source: Umt5Source, precision: str, folder: Path
) -> tuple[dict[str, Part], dict[str, Any]]:
    """Write graph, weights and tokenizer into `folder` and measure them; returns parts and figures."""
    began = perf_counter()
    stem = f"umt5_{precision}"
    stored = stored_tensors(source, precision)
    inputs: dict[str, TensorShape] = dict.fromkeys(("tokens", "mask"), (torch.int64, ("B", "L")))
    outputs: dict[str, TensorShape] = {
        "context": (torch.float32, ("B", "L", source.config.d_model))
    }
    module = Umt5Part(source.config, tuple(stored))
    part = PartModule(module.eval(), inputs | stored, outputs, stored=len(stored))
    graph = export_part("text", part, LOWERINGS["onnxruntime"].opset)
    log.info("  text      exported  %6.1f s", perf_counter() - began)

    with (
        TensorFile(folder / "unnamed.weights") as weights,
        Progress("text weights", len(source)) as progress,
    ):
        for name in source:
            store(source, name, precision, weights)
            progress.advance(name)
    weights.rename(content_name(stem, weights.sha256, ".weights"))
    read_from(graph, weights, stored)
    border = {
        "inputs": {name: TensorSpec("int64", ("B", "L")) for name in ("tokens", "mask")},
        "outputs": {"context": TensorSpec("float32", ("B", "L", source.config.d_model))},
    }
    parts = {
        "text": write_part(folder, stem, ".onnx", serialize(graph), **border),
        "text_weights": Part(weights.path.name, weights.sha256, weights.size),
        "tokenizer": write_part(folder, "umt5", ".tokenizer.json", source.tokenizer),
    }
    parity = _measure(source, folder / parts["text"].file, StoredWeights(weights, stored))
    log.info("  text      parity %.1e (budget %.0e); storing as %s moves embeddings by %.1e; %.1f MB, %.0f s",
             parity["relative_l2"], BUDGET, precision, parity["storage"], weights.size / 1e6,
             perf_counter() - began)  # fmt: skip
    if not parity["relative_l2"] <= BUDGET:
        raise EngineError(
            f"{source.name}: the text encoder misses its parity budget: relative L2 "
            f"{parity['relative_l2']:.1e} > {BUDGET:.0e} against torch with the same weights"
        )
    return parts, parity


@torch.no_grad()
def _measure(source: Umt5Source, file: Path, stored: Mapping[str, Tensor]) -> dict[str, float]:
    """Distances on tokens drawn at random: of the graph from torch, and of stored weights from exact ones."""
    config, generator = source.config, np.random.default_rng(0)
    tokens = generator.integers(0, config.vocab_size, (2, 24))
    mask = np.ones_like(tokens)
    mask[1, 15:] = 0
    session = open_text_session(file, usable_cores())
    (found,) = session.run(["context"], {"tokens": tokens, "mask": mask})
    given = buckets_by_offset(config), torch.from_numpy(tokens), torch.from_numpy(mask)
    expected = encode(config, stored, *given).numpy()
    exact = encode(config, source, *given).numpy()
    return {
        "relative_l2": relative_l2(found, expected),
        "budget": BUDGET,
        "storage": relative_l2(expected, exact),
    }
