"""ONNX Runtime: what was asked for is what runs, and buffers are bound, not copied."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from asd_rt.backends import ort
from asd_rt.backends.base import open_backend
from asd_rt.errors import BackendError, EngineError
from asd_rt.kv_cache import Move
from asd_rt.machine import usable_cores
from asd_rt.manifest import Part, TensorSpec, sha256_file
from asd_rt.noise import gaussian
from asd_rt.plan import ListedPlan
from asd_rt.session import Session


def test_threads_and_device(toy) -> None:
    assert open_backend(
        toy.path
    ).device == f"CPUExecutionProvider, {usable_cores()} threads".replace(" 1 threads", " 1 thread")
    engine = open_backend(toy.path, threads=1)
    assert engine.device == "CPUExecutionProvider, 1 thread"
    assert engine.session("denoiser").get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize("threads", [0, -1, True])
def test_impossible_threads(toy, threads) -> None:
    with pytest.raises(BackendError, match="threads must be"):
        open_backend(toy.path, threads=threads)


def test_a_provider_that_is_not_there_is_an_error(toy) -> None:
    with pytest.raises(BackendError, match="has no CUDAExecutionProvider"):
        ort.open_engine(toy.path, toy.manifest, provider="CUDAExecutionProvider")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_falls_back_is_an_error(toy, monkeypatch) -> None:
    import onnxruntime

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    with pytest.raises((BackendError, EngineError), match="CUDAExecutionProvider"):
        ort.open_engine(toy.path, toy.manifest, provider="CUDAExecutionProvider")


def test_without_onnxruntime(toy, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install 'asd-rt\[cpu\]'") as error:
        open_backend(toy.path)
    assert "\n" not in str(error.value)


def test_not_an_onnx_file(own_toy, respell) -> None:
    own_toy.path.write_bytes(b"not a graph")
    old = own_toy.manifest.parts["denoiser"]
    part = Part(own_toy.path.name, sha256_file(own_toy.path), 11, old.inputs, old.outputs)
    engine = respell(own_toy, parts={**own_toy.manifest.parts, "denoiser": part})
    with pytest.raises(EngineError, match="cannot load the denoiser part") as error:
        open_backend(engine.path)
    assert "\n" not in str(error.value)


def test_tensors_that_differ_from_the_manifest(own_toy, respell) -> None:
    old = own_toy.manifest.parts["time"]
    part = Part(
        old.file, old.sha256, old.bytes, {"steps": TensorSpec("float32", (1, "F"))}, old.outputs
    )
    engine = respell(own_toy, parts={**own_toy.manifest.parts, "time": part})
    with pytest.raises(EngineError, match="input steps differs from the manifest"):
        open_backend(engine.path)


def test_cache_dtype_that_cannot_run_here(own_toy, respell) -> None:
    old = own_toy.manifest.parts["denoiser"]
    outputs = {**old.outputs, "new_k.0": TensorSpec("bfloat16", ("T", "B", 2, 6))}
    engine = respell(
        own_toy,
        parts={
            **own_toy.manifest.parts,
            "denoiser": Part(old.file, old.sha256, old.bytes, old.inputs, outputs),
        },
    )
    with pytest.raises(EngineError, match="new_k"):
        open_backend(engine.path)


def test_an_engine_fixed_to_one_size(own_toy, respell) -> None:
    old = own_toy.manifest.parts["denoiser"]
    inputs = {**old.inputs, "latents": TensorSpec("float32", (1, "F", 2, 4, 2))}
    engine = respell(
        own_toy,
        parts={
            **own_toy.manifest.parts,
            "denoiser": Part(old.file, old.sha256, old.bytes, inputs, old.outputs),
        },
    )
    with pytest.raises(BackendError, match="axis 3 of latents is fixed to 4, found 6"):
        open_backend(engine.path).denoiser.prepare(1, (6, 2), 4)


def test_buffers_stay_and_only_the_block_is_written(toy) -> None:
    denoiser = open_backend(toy.path, threads=1).denoiser
    denoiser.prepare(1, (4, 2), 6)
    keys = denoiser._cache["k.0"]
    address = keys.ctypes.data
    denoiser.set_prompt(gaussian((1, 4, 3), 0, 0, 0))
    keys[:] = 7.0
    flow = denoiser.denoise(gaussian((1, 2, 2, 4, 2), 0, 0, 0), 500.0, range(2, 4), 2)
    assert (keys[:, :4] == 7).all() and (keys[:, 8:] == 7).all()  # 2 tokens a frame
    assert not (keys[:, 4:8] == 7).any()
    again = denoiser.denoise(gaussian((1, 2, 2, 4, 2), 1, 0, 0), 0.0, range(2, 4), 2)
    assert again is flow
    denoiser.prepare(1, (4, 2), 6)
    assert denoiser._cache["k.0"].ctypes.data == address
    denoiser.prepare(1, (4, 2), 8)
    assert denoiser._cache["k.0"].shape == (1, 16, 12)


def test_what_lies_behind_the_prefix_is_not_seen(toy) -> None:
    denoiser = open_backend(toy.path, threads=1).denoiser
    x = gaussian((1, 2, 2, 4, 2), 0, 0, 0)
    flows = []
    for rubbish in (0.0, 1e6):
        denoiser.prepare(1, (4, 2), 6)
        denoiser.set_prompt(gaussian((1, 4, 3), 0, 0, 0))
        denoiser.denoise(x, 0.0, range(2), 0)
        denoiser._cache["k.0"][:, 4:] = denoiser._cache["v.1"][:, 4:] = rubbish
        flows.append(denoiser.denoise(x, 1000.0, range(2, 4), 2).copy())
    np.testing.assert_array_equal(*flows)


def test_move_and_read(toy) -> None:
    denoiser = open_backend(toy.path, threads=1).denoiser
    denoiser.prepare(1, (4, 2), 6)
    for buffer in denoiser._cache.values():
        buffer[:] = np.arange(12, dtype=np.float32).reshape(12, 1) // 2
    denoiser.move([Move(source=4, target=1, frames=2)])
    keys, values = denoiser.read_cache(1, [2, 0, 1])
    assert keys.shape == values.shape == (1, 6, 2, 6)
    assert keys[0, :, 0, 0].tolist() == values[0, :, 1, 5].tolist() == [5, 5, 0, 0, 4, 4]


def test_timesteps_and_prompts_are_computed_once(toy, monkeypatch) -> None:
    engine = open_backend(toy.path, threads=1)
    denoiser = engine.denoiser
    parts: list[str] = []
    original = denoiser._part_session
    monkeypatch.setattr(
        denoiser,
        "_part_session",
        lambda part, sizes=None: parts.append(part) or original(part, sizes),
    )
    denoiser.prepare(1, (4, 2), 6)
    denoiser.set_prompt(gaussian((1, 4, 3), 0, 0, 0))
    x = gaussian((1, 2, 2, 4, 2), 0, 0, 0)
    for past in (0, 2, 4):
        for timestep in (1000.0, 500.0, 0.0):
            denoiser.denoise(x, timestep, range(past, past + 2), past)
    assert [part for part in parts if part != "denoiser"] == ["prompt", "time", "time", "time"]
    assert parts.count("denoiser") == 3  # bound once for each size of the past

    with pytest.raises(BackendError, match="needs prepare and set_prompt"):
        denoiser.prepare(1, (4, 2), 6)
        denoiser.denoise(x, 0.0, range(2), 0)
    held = {name: buffer.copy() for name, buffer in denoiser._prompt.items()}
    for context, times in ((0, 1), (1, 2), (0, 3)):  # the last video's again, another, the first
        denoiser.prepare(1, (4, 2), 6)
        denoiser.set_prompt(gaussian((1, 4, 3), context, 0, 0))
        assert parts.count("prompt") == times
    denoiser.denoise(x, 0.0, range(2), 0)
    for name, buffer in denoiser._prompt.items():
        np.testing.assert_array_equal(buffer, held[name])


def test_a_toy_has_no_joined_pass(toy) -> None:
    denoiser = open_backend(toy.path, threads=1).denoiser
    assert not denoiser.can_join
    denoiser.prepare(1, (4, 2), 6)
    x = gaussian((1, 2, 2, 4, 2), 0, 0, 0)
    with pytest.raises(BackendError, match="has no joined part; build it again"):
        denoiser.denoise_joined(x, x, 1000.0, range(4), 0, [])
    with pytest.raises(BackendError, match="has no joined pass; build it again"):
        Session(open_backend(toy.path, threads=1), join=True)


def test_a_bf16_engine_needs_openvino(toy, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match="pip install openvino") as error:
        ort.open_engine(toy.path, replace(toy.manifest, precision="bf16", runtime="openvino"))
    assert "\n" not in str(error.value)


def test_a_processor_without_bfloat16_is_told(toy, monkeypatch, caplog) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(ort, "instruction_sets", lambda: ["avx2"])
    ort.open_engine(toy.path, replace(toy.manifest, precision="bf16", runtime="openvino"))
    assert "no bfloat16 instructions" in caplog.text


def test_the_loop_on_openvino(toy) -> None:
    """The toy's passes in bfloat16, at fixed sizes and, for the empty cache, an open one."""
    pytest.importorskip("openvino")
    engine = ort.open_engine(
        toy.path, replace(toy.manifest, precision="bf16", runtime="openvino"), threads=1
    )
    assert engine.device == "OpenVINO bf16, 1 thread"
    exact = ort.open_engine(toy.path, toy.manifest, threads=1)
    noise, context = gaussian((2, 12, 2, 4, 2), 0, 0, 0), gaussian((2, 3, 3), 1, 0, 0)
    found, expected = (
        Session(e).replay(noise, context, plan=ListedPlan((2, 1)), dump_cache=True)
        for e in (engine, exact)
    )
    np.testing.assert_allclose(found.latents, expected.latents, rtol=0.05, atol=0.05)
    assert not np.array_equal(found.latents, expected.latents)  # bfloat16 did it
    for name, tensor in expected.cache.items():
        np.testing.assert_allclose(found.cache[name], tensor, rtol=0.05, atol=0.1)


def test_before_prepare(toy) -> None:
    denoiser = open_backend(toy.path, threads=1).denoiser
    with pytest.raises(BackendError, match="prepare and set_prompt"):
        denoiser.denoise(gaussian((1, 2, 2, 4, 2), 0, 0, 0), 0.0, range(2), 0)
