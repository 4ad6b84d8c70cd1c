"""The TensorRT backend without a card: its checks, and its loop on a machine made of host memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asd_rt.backends.ort import open_engine as open_ort
from asd_rt.backends.shared import SharedEngine
from asd_rt.backends.tensorrt import open_engine
from asd_rt.decoding import Decoder, Encoder
from asd_rt.errors import AsdError, BackendError, EngineError
from asd_rt.manifest import Manifest
from asd_rt.plan import ListedPlan
from asd_rt.session import Replay, Session
from tests.unit.asd_rt.fake_card import (
    CODEC,
    PASSES,
    Error,
    FakeContext,
    FakeCuda,
    FakeRuntime,
    FakeTrt,
    as_plan,
)


def refused(error: type[AsdError], told: str, path: Path, manifest: Manifest) -> None:
    with pytest.raises(error, match=told) as caught:
        open_engine(path, manifest)
    assert "\n" not in str(caught.value)
    assert FakeRuntime.made == 0, "a Runtime was made before the checks were done"


def test_a_batch_is_refused(toy: Any, machine: Callable[..., FakeCuda]) -> None:
    machine()
    engine = open_engine(toy.path, as_plan(toy.manifest))
    with pytest.raises(BackendError, match="one video at a time on a card, found a batch of 2"):
        engine.denoiser.prepare(2, (4, 2), 6)


def test_same_loop_as_onnx_runtime(toy: Any, machine: Callable[..., FakeCuda]) -> None:
    runtime = machine()
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1, 10, 2, 4, 2)).astype(np.float32)
    context = rng.standard_normal((1, 3, 3)).astype(np.float32)

    def play(session: Session) -> Replay:
        return session.replay(noise, context, plan=ListedPlan((2, 1, 3)), seed=4, dump_cache=True)

    engine = open_engine(toy.path, as_plan(toy.manifest))
    expected = play(Session(open_ort(toy.path, toy.manifest)))
    for _ in range(2):  # the second run reuses every buffer
        found = play(Session(engine))
        np.testing.assert_array_equal(found.latents, expected.latents)
        assert found.cache.keys() == expected.cache.keys()
        for name, array in expected.cache.items():
            np.testing.assert_array_equal(found.cache[name], array)
        held = len(runtime.memory)
    assert engine.device == "tensorrt_rtx 1.0, sm89"
    play(Session(engine))
    assert len(runtime.memory) == held, "a run leaves device memory behind"
    engine.close()
    engine.close()
    assert runtime.nothing_is_left()


def passes_of(runtime: FakeCuda, output: str = "new_k.0") -> list[tuple[Any, ...]]:
    """The direct and captured runs of contexts that make `output`: (stream, shapes, addresses)."""
    runs = [call[1:] for call in runtime.calls if call[0] == "run"]
    return [run for run in runs if output in run[2]]


def test_a_pass_writes_behind_the_prefix_that_it_reads(
    toy: Any, machine: Callable[..., FakeCuda]
) -> None:
    runtime = machine()
    engine = open_engine(toy.path, as_plan(toy.manifest))
    noise = np.random.default_rng(0).standard_normal((1, 10, 2, 4, 2)).astype(np.float32)
    context = np.zeros((1, 3, 3), np.float32)
    Session(engine).replay(noise, context, plan=ListedPlan((2, 1, 3)), dump_cache=True)
    runs = passes_of(runtime)
    lengths = {shapes["past_k.0"][1] for _, shapes, _ in runs}
    assert len(lengths) > 2
    width = 4 * toy.manifest.model.dim
    for stream, shapes, addresses in runs:
        assert stream == PASSES
        for name in ("k.0", "v.0"):
            past = shapes[f"past_{name}"][1]
            assert addresses[f"new_{name}"] == addresses[f"past_{name}"] + past * width
    for name in ("past_k.0", "past_v.0", "prompt_k.0", "modulation"):  # the same for all lengths
        assert len({addresses[name] for _, _, addresses in runs}) == 1
    engine.close()


def test_each_length_is_run_captured_and_then_replayed(
    toy: Any, machine: Callable[..., FakeCuda]
) -> None:
    runtime = machine()
    engine = open_engine(toy.path, as_plan(toy.manifest))
    denoiser = engine.denoiser
    denoiser.prepare(1, (4, 2), 6)
    denoiser.set_prompt(np.zeros((1, toy.manifest.model.text_len, 3), np.float32))
    draw = np.random.default_rng(0)
    told = []
    for past in (0, 2, 0, 2, 0, 2):
        runtime.calls.clear()
        x = draw.standard_normal((1, 2, 2, 4, 2)).astype(np.float32)
        denoiser.denoise(x, 500.0, range(past, past + 2), past)
        made = [call for call in runtime.calls if call[0] in ("begin", "run", "end", "launch")]
        told.append([call[0] for call in made if call[0] != "run" or "flow" in call[3]])
        assert {call[1] for call in made} == {PASSES}
        assert [call for call in runtime.calls if call[0] == "synchronize"] == [
            ("synchronize", PASSES)  # for the result, and for nothing else
        ]
        assert runtime.calls[-1] == ("synchronize", PASSES)
    captured = ["begin", "run", "end", "launch"]
    assert told == [["run"], ["run"], captured, captured, ["launch"], ["launch"]]
    assert len(runtime.executables) == 2 and not runtime.graphs
    denoiser.prepare(1, (4, 2), 6)  # a new video of the same size keeps them
    assert len(runtime.executables) == 2
    denoiser.prepare(1, (4, 2), 8)
    assert not runtime.executables, "graphs over a cache that is gone"
    engine.close()
    assert runtime.nothing_is_left()


def test_decoding_has_a_stream_of_its_own(
    stream_toy: Any, machine: Callable[..., FakeCuda]
) -> None:
    runtime = machine()
    engine = open_engine(stream_toy.path, as_plan(stream_toy.manifest))
    decoder = Decoder(engine, (4, 2))
    for _ in range(2):  # allocates for a first frame, and for others
        decoder.decode(np.zeros((1, 1, 2, 4, 2), np.float32))
    runtime.calls.clear()
    decoder.decode(np.ones((1, 1, 2, 4, 2), np.float32))
    queued = [call for call in runtime.calls if call[0] != "wait"]
    assert {call[1] for call in queued} == {CODEC}, "decoding waits for passes, or they for it"
    kinds = [call[0] for call in queued]
    assert kinds == ["HostToDevice", "record", "run", "DeviceToHost", "synchronize"]
    engine.close()


def test_sessions_share_a_plan(toy: Any, machine: Callable[..., FakeCuda]) -> None:
    """Two denoisers in turns give what each gives alone, and one of them can go."""
    runtime = machine()
    engine = open_engine(toy.path, as_plan(toy.manifest))
    context = np.ones((1, toy.manifest.model.text_len, 3), np.float32)
    x = np.random.default_rng(0).standard_normal((1, 2, 2, 4, 2)).astype(np.float32)
    both = [engine.denoiser, engine.new_denoiser()]
    for denoiser, scale in zip(both, (1, 2), strict=True):
        denoiser.prepare(1, (4, 2), 6)
        denoiser.set_prompt(scale * context)
    flows: list[list[np.ndarray]] = [[], []]
    for _ in range(3):
        for denoiser, found in zip(both, flows, strict=True):
            found.append(denoiser.denoise(x, 500.0, range(2), 0))
    for found in flows:
        np.testing.assert_array_equal(found[0], found[2])
    assert not np.array_equal(flows[0][0], flows[1][0])
    held = len(runtime.memory)
    both[1].release()
    assert len(runtime.memory) < held and len(runtime.executables) == 1
    np.testing.assert_array_equal(both[0].denoise(x, 500.0, range(2), 0), flows[0][0])
    engine.close()
    both[1].release()
    assert runtime.nothing_is_left()


def test_a_failed_pass_leaves_nothing_behind(
    toy: Any, machine: Callable[..., FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = machine()
    engine = open_engine(toy.path, as_plan(toy.manifest))
    denoiser = engine.denoiser
    denoiser.prepare(1, (4, 2), 6)
    denoiser.set_prompt(np.zeros((1, toy.manifest.model.text_len, 3), np.float32))
    x = np.zeros((1, 2, 2, 4, 2), np.float32)
    denoiser.denoise(x, 500.0, range(2), 0)
    monkeypatch.setattr(FakeContext, "execute_async_v3", lambda self, stream: False)
    with pytest.raises(BackendError, match="could not run"):
        denoiser.denoise(x, 500.0, range(2), 0)  # while it is captured
    assert runtime.captured is None, "the stream is left capturing"
    assert not runtime.graphs and not runtime.executables
    monkeypatch.undo()
    engine.close()
    assert runtime.nothing_is_left()


def test_a_pass_that_cannot_be_captured_is_one_line(
    toy: Any, machine: Callable[..., FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = machine()
    engine = open_engine(toy.path, as_plan(toy.manifest))
    engine.denoiser.prepare(1, (4, 2), 6)
    engine.denoiser.set_prompt(np.zeros((1, toy.manifest.model.text_len, 3), np.float32))
    x = np.zeros((1, 2, 2, 4, 2), np.float32)
    engine.denoiser.denoise(x, 500.0, range(2), 0)

    def end(stream: int) -> tuple[Error, None]:
        runtime.captured = None
        return Error.cudaErrorStreamCaptureUnsupported, None

    monkeypatch.setattr(runtime, "cudaStreamEndCapture", end)
    with pytest.raises(BackendError, match="cudaErrorStreamCaptureUnsupported"):
        engine.denoiser.denoise(x, 500.0, range(2), 0)
    engine.close()
    assert runtime.nothing_is_left()


def test_close_releases_all_that_it_can(toy: Any, machine: Callable[..., FakeCuda]) -> None:
    """One handle that cannot be released does not keep the others."""
    runtime = machine()
    engine = open_engine(toy.path, as_plan(toy.manifest))
    engine.denoiser.prepare(1, (4, 2), 6)
    stuck = min(runtime.memory)

    def free(address: int) -> tuple[Error]:
        if address == stuck:
            return (Error.cudaErrorMemoryAllocation,)
        return runtime._free(address)

    runtime.cudaFree = free  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="CUDA failed"):
        engine.close()
    assert list(runtime.memory) == [stuck] and not runtime.streams
    engine.close()


def test_a_cache_of_bfloat16_is_read_as_float32(toy: Any, machine: Callable[..., FakeCuda]) -> None:
    machine()
    denoiser = toy.manifest.parts["denoiser"]
    spec = replace(denoiser.outputs["new_k.0"], dtype="bfloat16")
    changed = replace(denoiser, outputs={**denoiser.outputs, "new_k.0": spec})
    manifest = as_plan(toy.manifest, parts={**toy.manifest.parts, "denoiser": changed})
    engine = open_engine(toy.path, manifest)
    engine.denoiser.prepare(1, (4, 2), 6)
    tokens, dim = 2, toy.manifest.model.dim
    values = np.linspace(-3, 3, tokens * dim, dtype=np.float32).view(np.uint32) >> 16
    bits = values.astype(np.uint16)
    ctypes.memmove(engine.denoiser._cache["k.0"], bits.ctypes.data, bits.nbytes)
    keys, _ = engine.denoiser.read_cache(0, [0])
    np.testing.assert_array_equal(keys.ravel(), (values << 16).astype(np.uint32).view(np.float32))
    engine.close()


def test_text_and_decoder(toy: Any, machine: Callable[..., FakeCuda]) -> None:
    machine()
    engine, reference = (
        open_engine(toy.path, as_plan(toy.manifest)),
        open_ort(toy.path, toy.manifest),
    )
    tokens = np.array([[1, 2, 0, 0]])
    np.testing.assert_array_equal(engine.encode_prompt(tokens), reference.encode_prompt(tokens))
    latents = np.random.default_rng(0).standard_normal((1, 2, 2, 4, 2)).astype(np.float32)
    found, expected = (Decoder(e, (4, 2)).decode(latents) for e in (engine, reference))
    np.testing.assert_array_equal(found, expected)
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        Decoder(engine, (4, 2)).decode(latents)


def test_a_codec_with_caches(stream_toy: Any, machine: Callable[..., FakeCuda]) -> None:
    """Its two sets of caches swap, and stay where they are from video to video."""
    runtime = machine()
    engine = open_engine(stream_toy.path, as_plan(stream_toy.manifest))
    reference = open_ort(stream_toy.path, stream_toy.manifest)
    latents = np.random.default_rng(0).standard_normal((1, 7, 2, 4, 2)).astype(np.float32)
    frames = np.random.default_rng(1).standard_normal((1, 7, 3, 4, 2)).astype(np.float32)
    held = 0
    for _ in range(2):
        for whole in (engine, reference):
            decoder = Decoder(whole, (4, 2))
            made = [decoder.decode(latents[:, i : i + 3]).copy() for i in range(0, 7, 3)]
            if whole is engine:
                found, encoded = made, Encoder(whole, (4, 2)).encode(frames)
        for one, other in zip(found, made, strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(encoded, Encoder(reference, (4, 2)).encode(frames))
        assert held in (0, len(runtime.memory)), "a video leaves device memory behind"
        held = len(runtime.memory)
    engine.close()
    assert runtime.nothing_is_left()


def test_codecs_of_videos_in_turns(stream_toy: Any, machine: Callable[..., FakeCuda]) -> None:
    """Videos that share an engine have feature caches of their own."""
    runtime = machine()
    engine = open_engine(stream_toy.path, as_plan(stream_toy.manifest))
    draw = np.random.default_rng(0)
    videos = draw.standard_normal((2, 1, 6, 2, 4, 2)).astype(np.float32)
    blocks = [slice(i, i + 2) for i in range(0, 6, 2)]
    alone = []
    for video in videos:
        decoder = Decoder(engine, (4, 2))
        alone.append([decoder.decode(video[:, block]).copy() for block in blocks])
    held = len(runtime.memory)
    shared = [SharedEngine(engine) for _ in videos]
    decoders = [Decoder(one, (4, 2)) for one in shared]
    for turn, block in enumerate(blocks):
        for video, decoder, expected in zip(videos, decoders, alone, strict=True):
            np.testing.assert_array_equal(decoder.decode(video[:, block]), expected[turn])
    for one in shared:
        one.close()
    assert len(runtime.memory) == held
    engine.close()
    assert runtime.nothing_is_left()


def test_other_version(toy: Any, machine: Callable[..., FakeCuda]) -> None:
    machine(cards=0)  # the manifest is judged before the driver is
    manifest = as_plan(toy.manifest, tools={"tensorrt_rtx": "0.9"})
    refused(EngineError, r"built by tensorrt_rtx 0\.9, installed is 1\.0", toy.path, manifest)


def test_other_gpu(toy: Any, machine: Callable[..., FakeCuda]) -> None:
    machine()
    manifest = as_plan(toy.manifest, gpus=("sm86", "sm120"))
    refused(EngineError, "for sm86, sm120, this machine has sm89", toy.path, manifest)


@pytest.mark.parametrize(
    "settings", [{"cards": 0}, {"cards": 0, "error": Error.cudaErrorInsufficientDriver}]
)
def test_no_card_or_driver(
    toy: Any, machine: Callable[..., FakeCuda], settings: dict[str, Any]
) -> None:
    machine(**settings)
    refused(BackendError, "no usable NVIDIA card", toy.path, as_plan(toy.manifest))


def test_module_absent(
    toy: Any, machine: Callable[..., FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    refused(BackendError, r"pip install 'asd-rt\[rtx\]'", toy.path, as_plan(toy.manifest))


def test_cuda_python_absent(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTrt("tensorrt_rtx"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    FakeRuntime.made = 0
    refused(BackendError, "pip install 'cuda-python", toy.path, as_plan(toy.manifest))


def test_out_of_device_memory_is_one_line(
    toy: Any, machine: Callable[..., FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = machine()
    engine = open_engine(toy.path, as_plan(toy.manifest))
    monkeypatch.setattr(runtime, "cudaMalloc", lambda size: (Error.cudaErrorMemoryAllocation, None))
    with pytest.raises(BackendError, match="cudaErrorMemoryAllocation"):
        engine.denoiser.prepare(1, (4, 2), 6)
    engine.close()


def test_fixed_latent_size(toy: Any, machine: Callable[..., FakeCuda]) -> None:
    machine()
    engine = open_engine(toy.path, as_plan(toy.manifest))
    with pytest.raises(BackendError, match="fixed to"):
        engine.denoiser.prepare(1, (6, 2), 6)
    engine.close()
