"""The TensorRT backend without a card: its checks, and its loop on a machine made of host memory.

`FakeCuda` hands out host memory as device memory and `FakeTrt` runs the toy engine's graphs in ONNX Runtime
on the addresses bound to it, so that buffers, prefixes, offsets and moves are those of a real run.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest

from asd_rt.backends import cuda
from asd_rt.backends.ort import open_engine as open_ort
from asd_rt.backends.tensorrt import open_engine
from asd_rt.decoding import Decoder, Encoder
from asd_rt.errors import AsdError, BackendError, EngineError
from asd_rt.manifest import Manifest
from asd_rt.plan import ListedPlan
from asd_rt.session import Replay, Session

DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class Error(Enum):
    cudaSuccess = 0
    cudaErrorInsufficientDriver = 35
    cudaErrorMemoryAllocation = 2


class Kind(Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class Attribute(Enum):
    cudaDevAttrComputeCapabilityMajor = 8
    cudaDevAttrComputeCapabilityMinor = 9


class FakeCuda(ModuleType):
    """cuda.bindings.runtime over host memory."""

    cudaError_t, cudaMemcpyKind, cudaDeviceAttr = Error, Kind, Attribute

    def __init__(self, cards: int = 1, error: Error = Error.cudaSuccess) -> None:
        super().__init__("cuda.bindings.runtime")
        self.cards, self.error = cards, error
        self.memory: dict[int, Any] = {}
        self.streams = 0

    def cudaGetDeviceCount(self) -> tuple[Error, int]:
        return self.error, self.cards

    def cudaDeviceGetAttribute(self, kind: Attribute, card: int) -> tuple[Error, int]:
        return Error.cudaSuccess, kind.value

    def cudaStreamCreate(self) -> tuple[Error, int]:
        self.streams += 1
        return Error.cudaSuccess, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        self.streams -= 1
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Error, int]:
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return Error.cudaSuccess, ctypes.addressof(buffer)

    def cudaFree(self, address: int) -> tuple[Error]:
        del self.memory[address]
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(
        self, to: int, source: int, size: int, kind: Kind, stream: int
    ) -> tuple[Error]:
        ctypes.memmove(to, source, size)
        return (Error.cudaSuccess,)


class FakeContext:
    """An execution context that runs an ONNX graph."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.types = {
            v.name: DTYPES[v.type] for v in (*session.get_inputs(), *session.get_outputs())
        }
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.types

    def _feeds(self) -> dict[str, Any]:
        feeds = {}
        for name, shape in self.shapes.items():
            array = np.empty(shape, self.types[name])
            ctypes.memmove(array.ctypes.data, self.addresses[name], array.nbytes)
            feeds[name] = array
        return feeds

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.session.run([name], self._feeds())[0].shape)

    def execute_async_v3(self, stream: int) -> bool:
        names = [v.name for v in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, self._feeds()), strict=True):
            ctypes.memmove(
                self.addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes
            )
        return True


class FakeEngine:
    def __init__(self, content: bytes) -> None:
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self.session)


class FakeRuntime:
    made = 0

    def __init__(self, logger: object) -> None:
        FakeRuntime.made += 1

    def deserialize_cuda_engine(self, content: bytes) -> FakeEngine:
        return FakeEngine(content)


class FakeTrt(ModuleType):
    """tensorrt_rtx whose plans are ONNX files."""

    __version__ = "1.0"
    ILogger = type("ILogger", (), {})
    Runtime = FakeRuntime


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeCuda]:
    """Install a fake TensorRT and a fake CUDA with so many cards."""

    def install(**settings: Any) -> FakeCuda:
        runtime = FakeCuda(**settings)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTrt("tensorrt_rtx"))
        monkeypatch.setattr("asd_rt.backends.tensorrt.import_cuda", lambda: runtime)
        monkeypatch.setattr(cuda, "import_cuda", lambda: runtime)
        FakeRuntime.made = 0
        return runtime

    return install


def as_plan(manifest: Manifest, **changes: Any) -> Manifest:
    fields = {"backend": "tensorrt_rtx", "tools": {"tensorrt_rtx": "1.0"}, "gpus": ("sm89",)}
    return replace(manifest, **(fields | changes))


def refused(error: type[AsdError], told: str, path: Path, manifest: Manifest) -> None:
    with pytest.raises(error, match=told) as caught:
        open_engine(path, manifest)
    assert "\n" not in str(caught.value)
    assert FakeRuntime.made == 0, "a Runtime was made before the checks were done"


def test_a_batch_is_refused(toy: Any, machine: Callable[..., FakeCuda]) -> None:
    machine()
    engine = open_engine(toy.path, as_plan(toy.manifest))
    with pytest.raises(BackendError, match="one video at a time, found a batch of 2"):
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
    assert runtime.memory == {}
    assert runtime.streams == 0


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
    assert runtime.memory == {}


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
