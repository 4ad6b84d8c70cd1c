"""`asd-rt replay`: one run with given noise, to compare engines and machines number by number."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from asd_rt.commands.common import Outcome, Problems, add_engine, add_json, find_engine
from asd_rt.commands.recording import durations
from asd_rt.errors import ConfigError
from asd_rt.files import check_writable, replacing
from asd_rt.noise import MAX_SEED
from asd_rt.plan import ListedPlan
from asd_rt.session import Replay, open_session

HELP = "run once with given noise and write the latents"
EXAMPLES = """examples:
  asd-rt replay --engine engines/asd_fp32.onnx --inputs inputs.safetensors --out result.safetensors
  asd-rt replay --engine E.onnx --inputs trace.safetensors --out result.safetensors --steps-per-block 4,1,1

inputs:  noise [B, F, C, h, w], context [B, tokens, text_dim], optionally initial [B, frames, C, h, w] and
         renoise.block{b}.step{i} [B, block frames, C, h, w]; what is missing is drawn from --seed
results: latents [B, F, C, h, w], and the cache as kv_cache.layer{i}.k and .v [B, tokens, heads, head_dim]
         (kv_cache.last.v is the last layer's), all float32
"""
_RENOISE = re.compile(r"renoise\.block(\d+)\.step(\d+)")
_log = logging.getLogger(__name__)
FloatArray = NDArray[np.float32]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `replay`."""
    add_engine(parser)
    parser.add_argument("--inputs", required=True, metavar="FILE", help="safetensors file to read")
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument(
        "--steps-per-block",
        metavar="N,N,...",
        help="steps of each generated block; the last number serves all further ones (default: the "
        "engine's plan)",
    )
    parser.add_argument("--seed", metavar="N", default="0", help="of noise not given (default: 0)")
    parser.add_argument(
        "--dump-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the KV cache after the last block's cache pass too (default: yes)",
    )
    add_json(parser)


def execute(args: argparse.Namespace) -> Outcome:
    """Read, run, write.

    Raises:
        AsdError: anything the user can mend.
    """
    problems = Problems()
    seed = problems.integer("--seed", args.seed, 0, MAX_SEED) or 0
    threads = problems.integer("--threads", args.threads, 1)
    plan = _plan(problems, args.steps_per_block)
    with problems.collect():
        check_writable(args.out, "--out")
    tensors: dict[str, FloatArray] = {}
    renoise: dict[tuple[int, int], FloatArray] = {}
    with problems.collect():
        tensors, renoise = read_inputs(Path(args.inputs))
    found = find_engine(problems, args.engine)
    problems.raise_any()
    path, manifest = found or (Path(), None)

    with open_session(path, threads, device=args.device) as session:
        result = session.replay(
            noise=tensors["noise"],
            context=tensors["context"],
            initial=tensors.get("initial"),
            renoise=renoise,
            plan=plan,
            seed=seed,
            dump_cache=args.dump_cache,
        )
        device = session.engine.device
    _write(Path(args.out), result)
    document = {
        "engine": str(path),
        "precision": manifest.precision if manifest else "",
        "device": device,
        "inputs": args.inputs,
        "out": args.out,
        "seed": seed,
        "shape": list(result.latents.shape),
        "steps": [block.steps for block in result.blocks],
        "blocks": [{"index": block.index, **durations(block)} for block in result.blocks],
    }
    steps = ", ".join(map(str, document["steps"]))
    text = f"{args.out}: latents {document['shape']}, {len(result.blocks)} blocks of {steps} steps, {path}"
    return Outcome(document, text)


def _plan(problems: Problems, text: str | None) -> ListedPlan | None:
    if text is None:
        return None
    steps = [problems.steps("--steps-per-block", part.strip()) for part in text.split(",")]
    known = tuple(count for count in steps if count is not None)
    return ListedPlan(known) if len(known) == len(steps) else None


def read_inputs(path: Path) -> tuple[dict[str, FloatArray], dict[tuple[int, int], FloatArray]]:
    """The tensors of a replay: (noise, context and perhaps initial by name, renoise by block and step).

    Raises:
        ConfigError: the file is absent, damaged, or lacks a tensor, or a tensor is no float or not finite.
    """
    from safetensors.numpy import load_file

    if not path.is_file():
        raise ConfigError(
            f"--inputs {path}: no such file; make one with safetensors.numpy.save_file"
        )
    try:
        loaded = load_file(path)
    except (SafetensorError, OSError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"--inputs {path}: cannot be read as safetensors of float32 tensors ({error})"
        ) from error
    missing = [name for name in ("noise", "context") if name not in loaded]
    if missing:
        raise ConfigError(
            f"--inputs {path}: missing {' and '.join(missing)}; it holds "
            f"{', '.join(sorted(loaded)) or 'nothing'}"
        )
    tensors, renoise, unused = {}, {}, []
    for name, value in loaded.items():
        match = _RENOISE.fullmatch(name)
        if match:
            renoise[int(match[1]), int(match[2])] = _floats(path, name, value)
        elif name in ("noise", "context", "initial"):
            tensors[name] = _floats(path, name, value)
        elif name.startswith("renoise"):
            raise ConfigError(
                f"--inputs {path}: unknown tensor {name}; fresh noise is named renoise.block0.step0"
            )
        else:
            unused.append(name)
    if unused:
        _log.info("%s: not used: %s", path, ", ".join(sorted(unused)))
    return tensors, renoise


def _floats(path: Path, name: str, value: NDArray[Any]) -> FloatArray:
    if not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
        raise ConfigError(f"--inputs {path}: {name} must hold finite floats, found {value.dtype}")
    return np.ascontiguousarray(value, np.float32)


def _write(path: Path, result: Replay) -> None:
    """Write the results, whole or not at all."""
    from safetensors.numpy import save_file

    tensors = {"latents": result.latents, **result.cache}
    if result.cache:
        last = max(int(name.split(".")[1].removeprefix("layer")) for name in result.cache)
        tensors["kv_cache.last.v"] = result.cache[f"kv_cache.layer{last}.v"]
    with replacing(path) as temporary:
        try:
            save_file(
                {name: np.ascontiguousarray(array) for name, array in tensors.items()}, temporary
            )
        except SafetensorError as error:
            raise OSError(str(error)) from error
