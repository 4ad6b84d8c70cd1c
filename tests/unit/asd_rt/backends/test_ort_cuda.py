"""ONNX Runtime on a card, without one: its checks, and its loop with host memory in the place of the card's.

Sessions, bindings and addresses are real; ONNX Runtime's CPU provider computes what a card would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
import pytest

import asd_rt
from asd_rt.backends import ort_cuda
from asd_rt.backends.base import open_backend, runs_on_cpu
from asd_rt.backends.cuda import Cuda
from asd_rt.backends.ort import open_engine as open_ort
from asd_rt.backends.ort_cuda import CUDA_PROVIDER, OrtCudaEngine, open_engine
from asd_rt.decoding import Decoder
from asd_rt.errors import BackendError, ConfigError, EngineError
from asd_rt.plan import ListedPlan
from asd_rt.session import Replay, Session
from tests.unit.asd_rt.fake_card import FakeCuda


class HostEngine(OrtCudaEngine):
    """The engine with host memory for a card."""

    provider, memory = "CPUExecutionProvider", "cpu"
    config: Mapping[str, str] = {}

    def _provider_options(self, stream: Any) -> dict[str, str]:
        return {}


@pytest.fixture
def runtime() -> FakeCuda:
    return FakeCuda()


def host_engine(toy: Any, runtime: FakeCuda) -> HostEngine:
    return HostEngine(toy.path, toy.manifest, onnxruntime, Cuda(runtime), "sm89")


def test_same_loop_as_on_the_cpu(toy: Any, runtime: FakeCuda) -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1, 10, 2, 4, 2)).astype(np.float32)
    context = rng.standard_normal((1, 3, 3)).astype(np.float32)

    def play(session: Session) -> Replay:
        return session.replay(noise, context, plan=ListedPlan((2, 1, 3)), seed=4, dump_cache=True)

    engine = host_engine(toy, runtime)
    expected = play(Session(open_ort(toy.path, toy.manifest), join=False))
    for _ in range(2):  # the second run reuses every buffer
        found = play(Session(engine))
        np.testing.assert_array_equal(found.latents, expected.latents)
        assert found.cache.keys() == expected.cache.keys()
        for name, array in expected.cache.items():
            np.testing.assert_array_equal(found.cache[name], array)
    engine.close()
    engine.close()
    assert runtime.memory == {}
    assert not runtime.streams


def test_text_and_decoder(toy: Any, runtime: FakeCuda) -> None:
    engine, reference = host_engine(toy, runtime), open_ort(toy.path, toy.manifest)
    tokens = np.array([[1, 2, 0, 0]])
    np.testing.assert_array_equal(engine.encode_prompt(tokens), reference.encode_prompt(tokens))
    latents = np.random.default_rng(0).standard_normal((1, 2, 2, 4, 2)).astype(np.float32)
    found, expected = (Decoder(e, (4, 2)).decode(latents) for e in (engine, reference))
    np.testing.assert_array_equal(found, expected)
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        Decoder(engine, (4, 2)).decode(latents)


def test_the_stream_is_the_copies_own(toy: Any, runtime: FakeCuda) -> None:
    asked = []

    class Watched(HostEngine):
        def _provider_options(self, stream: Any) -> dict[str, str]:
            asked.append(OrtCudaEngine._provider_options(self, stream)["user_compute_stream"])
            return {}

    engine = Watched(toy.path, toy.manifest, onnxruntime, Cuda(runtime), "sm89")
    assert asked == [str(engine.cuda.stream)]
    engine.part("decoder")
    assert asked[1:] == [str(engine.cuda.codec_stream)]


def test_asked_for_without_cuda_is_an_error(toy: Any) -> None:
    if CUDA_PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(BackendError, match=rf"has no {CUDA_PROVIDER}, only .*asd-rt\[gpu\]"):
        asd_rt.open(toy.path, device="cuda")


def test_asked_for_without_a_card_is_an_error(
    toy: Any, runtime: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build for CUDA lists its provider everywhere."""
    runtime.cards = 0
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA_PROVIDER])
    monkeypatch.setattr("asd_rt.backends.ort_cuda.import_cuda", lambda: runtime)
    monkeypatch.setattr("asd_rt.backends.cuda.import_cuda", lambda: runtime)
    with pytest.raises(BackendError, match="no usable NVIDIA card"):
        open_engine(toy.path, toy.manifest)
    assert not runtime.streams


def test_a_graph_that_the_provider_does_not_take_whole(toy: Any, runtime: FakeCuda) -> None:
    """ONNX Runtime refuses nodes left to the CPU; here the CPU itself is the provider asked for."""

    class Strict(HostEngine):
        config = OrtCudaEngine.config

    with pytest.raises(EngineError, match="cannot run all of this graph on the card") as caught:
        Strict(toy.path, toy.manifest, onnxruntime, Cuda(runtime), "sm89")
    assert "\n" not in str(caught.value)


def test_a_silent_fallback_is_an_error(toy: Any, runtime: FakeCuda) -> None:
    """Asked for CUDA, this onnxruntime warns and takes the CPU."""
    if CUDA_PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")

    class Lax(OrtCudaEngine):
        config: Mapping[str, str] = {}

    with (
        pytest.warns(UserWarning, match=CUDA_PROVIDER),
        pytest.raises(BackendError, match=f"asked for {CUDA_PROVIDER}, got CPUExecutionProvider"),
    ):
        Lax(toy.path, toy.manifest, onnxruntime, Cuda(runtime), "sm89")


def test_unknown_device(toy: Any) -> None:
    with pytest.raises(ConfigError, match="device must be one of auto, cpu, cuda, found 'gpu'"):
        open_backend(toy.path, device="gpu")


def test_a_driver_without_cuda_in_onnxruntime_is_told(
    toy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("asd_rt.backends.base.has_nvidia_driver", lambda: True)
    monkeypatch.setattr(ort_cuda, "is_available", lambda: False)
    open_backend(toy.path).close()
    assert "runs on the CPU though there is an NVIDIA driver" in caplog.text


def test_a_driver_without_a_card_is_told_and_the_cpu_is_taken(
    toy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where CUDA_VISIBLE_DEVICES is empty, or a container was not given the card."""

    def none() -> str:
        raise BackendError("no usable NVIDIA card (cudaErrorNoDevice, 0 cards)")

    monkeypatch.setattr("asd_rt.backends.base.has_nvidia_driver", lambda: True)
    monkeypatch.setattr(ort_cuda, "is_available", lambda: True)
    monkeypatch.setattr("asd_rt.backends.cuda.present_gpu", none)
    open_backend(toy.path).close()
    assert "runs on the CPU though there is an NVIDIA driver: no usable" in caplog.text
    assert runs_on_cpu(toy.path, toy.manifest, "auto")
    assert not runs_on_cpu(toy.path, toy.manifest, "cuda"), "asked for by name: that or an error"
