"""The four golden traces: torch to 1e-5, and the real commands to 1e-4, cache contents included."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from asd_rt.backends.base import open_backend
from asd_rt.plan import FixedPlan, ListedPlan
from asd_rt.schedule import Schedule, flow_to_x0
from asd_rt.session import Replay, Session
from export.build import main as build
from export.engine import Target
from export.reference import TorchEngine
from export.settings import Overrides, make_manifest, resolve
from train.checkpoint import load_checkpoint
from train.model import make_rope

TORCH_TOLERANCE = 1e-5
ONNX_TOLERANCE = 1e-4
Compare = Callable[[NDArray[Any], NDArray[Any]], float]


def torch_session(folder: Path, flags: Overrides, placeholder_parts: dict[str, Any]) -> Session:
    checkpoint = load_checkpoint(folder)
    settings = resolve(checkpoint, flags, FixedPlan(1, 4))
    manifest = make_manifest(checkpoint, settings, "fp32", "onnx", placeholder_parts)
    return Session(TorchEngine(checkpoint, manifest))


def check(
    trace: Any, latents: NDArray[Any], cache: dict[str, Any], compare: Compare, limit: float
) -> None:
    assert compare(latents, trace.tensors["latents"]) < limit
    tokens = trace.values["kv_valid_tokens"]
    last = max(int(name.split(".")[1].removeprefix("layer")) for name in cache if ".layer" in name)
    first_k, last_v = cache["kv_cache.layer0.k"], cache[f"kv_cache.layer{last}.v"]
    assert first_k.shape[1] == tokens
    assert compare(first_k, trace.tensors["kv_cache.layer0.k"][:, :tokens]) < limit
    assert compare(last_v, trace.tensors["kv_cache.last.v"][:, :tokens]) < limit


def given_renoise(trace: Any) -> dict[tuple[int, int], NDArray[Any]]:
    found = {}
    for name, tensor in trace.tensors.items():
        if name.startswith("renoise."):
            block, step = name.removeprefix("renoise.block").split(".step")
            found[int(block), int(step)] = tensor
    return found


def test_torch_rollout(trace: Any, relative_l2: Compare, placeholder_parts: dict[str, Any]) -> None:
    flags = Overrides(block_frames=trace.values["block_frames"])
    session = torch_session(trace.folder, flags, placeholder_parts)
    result: Replay = session.replay(
        trace.tensors["noise"],
        trace.tensors["context"],
        initial=trace.initial,
        renoise=given_renoise(trace),
        plan=ListedPlan(trace.steps),
        dump_cache=True,
    )
    check(trace, result.latents, result.cache, relative_l2, TORCH_TOLERANCE)


def test_schedule_of_every_step_count(trace: Any) -> None:
    schedule = Schedule(trace.values["timestep_shift"])
    for count, timesteps in trace.values["warped"].items():
        assert [step.timestep for step in schedule.steps(int(count))] == timesteps


@torch.no_grad()
def test_first_pass(trace: Any, relative_l2: Compare) -> None:
    """The network alone, on an empty cache (the first denoising pass where nothing was given)."""
    if trace.initial is not None:
        pytest.skip("its first pass already has a past")
    model = load_checkpoint(trace.folder).build_model()
    x = trace.tensors["pass000.input"]
    sigma = trace.values["passes"][0]["timestep"] / 1000
    time = model.embed_time(torch.full((1, x.shape[1]), 1000 * sigma))
    rope = make_rope(model.config, range(x.shape[1]), (x.shape[3] // 2, x.shape[4] // 2))
    prompt = model.embed_prompt(torch.from_numpy(trace.tensors["context"]))
    flow, _ = model.denoise(torch.from_numpy(x), time, prompt, rope)
    assert relative_l2(flow.numpy(), trace.tensors["pass000.flow"]) < TORCH_TOLERANCE
    x0 = flow_to_x0(flow.numpy(), x, sigma)
    assert relative_l2(x0, trace.tensors["pass000.x0"]) < TORCH_TOLERANCE


def test_build_and_replay_commands(
    trace: Any, relative_l2: Compare, root: Path, tmp_path: Path
) -> None:
    block = trace.values["block_frames"]
    words = [
        "--checkpoint",
        trace.folder,
        "--precision",
        "fp32",
        "--target",
        "onnx",
        "--out",
        tmp_path,
    ]
    words += [] if block == 3 else ["--block-frames", str(block)]
    assert build([str(word) for word in words]) == 0
    inputs = {
        k: v
        for k, v in trace.tensors.items()
        if k in ("noise", "context") or k.startswith("renoise.")
    }
    if trace.initial is not None:
        inputs["initial"] = trace.initial
    save_file(
        {k: np.ascontiguousarray(v) for k, v in inputs.items()}, tmp_path / "inputs.safetensors"
    )
    engine = tmp_path / Target("onnx", "fp32").file
    steps = ",".join(map(str, trace.steps))
    words = ["replay", "--engine", engine, "--inputs", tmp_path / "inputs.safetensors"]
    run(root, "asd_rt", *words, "--out", tmp_path / "out.safetensors", "--steps-per-block", steps)
    found = load_file(tmp_path / "out.safetensors")
    cache = {name: tensor for name, tensor in found.items() if name.startswith("kv_cache.")}
    check(trace, found["latents"], cache, relative_l2, ONNX_TOLERANCE)
    joined = Session(open_backend(engine), join=True).replay(
        trace.tensors["noise"],
        trace.tensors["context"],
        initial=trace.initial,
        renoise=given_renoise(trace),
        plan=ListedPlan(trace.steps),
        dump_cache=True,
    )
    check(trace, joined.latents, joined.cache, relative_l2, ONNX_TOLERANCE)


def run(root: Path, module: str, *words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
