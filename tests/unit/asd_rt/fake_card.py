"""A card made of host memory: the little of CUDA and TensorRT that the backends use.

`FakeCuda` hands out host memory as device memory and notes what is queued where; `FakeTrt` runs the toy
engine's graphs in ONNX Runtime on the addresses bound to it, so that buffers, prefixes, offsets and moves are
those of a real run. `LazyCuda` runs nothing before the host waits, and then only what that needs.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import onnxruntime

from asd_rt.manifest import Manifest

DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class Error(Enum):
    cudaSuccess = 0
    cudaErrorInsufficientDriver = 35
    cudaErrorMemoryAllocation = 2
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class Kind(Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class Attribute(Enum):
    cudaDevAttrComputeCapabilityMajor = 8
    cudaDevAttrComputeCapabilityMinor = 9


class CaptureMode(Enum):
    cudaStreamCaptureModeThreadLocal = 1


PASSES, CODEC = 7, 8  # streams, in the order in which they are made
OK = Error.cudaSuccess


class FakeCuda(ModuleType):
    """cuda.bindings.runtime over host memory, which notes what is done in which order.

    Attributes:
        memory: buffers by address, of the device and pinned.
        calls: (what, stream, more) of everything queued, replayed or waited for.
        captured: while a stream is capturing, what it would do.
    """

    cudaError_t, cudaMemcpyKind, cudaDeviceAttr = Error, Kind, Attribute
    cudaStreamCaptureMode = CaptureMode
    cudaEventDefault, cudaEventDisableTiming, cudaStreamNonBlocking = 0, 2, 1

    def __init__(self, cards: int = 1, error: Error = Error.cudaSuccess) -> None:
        super().__init__("cuda.bindings.runtime")
        self.cards, self.error = cards, error
        self.memory: dict[int, Any] = {}
        self.streams: list[int] = []
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self.events: set[int] = set()
        self.captured: list[Callable[[], None]] | None = None
        self.calls: list[tuple[Any, ...]] = []
        self.handle = 100

    def cudaGetDeviceCount(self) -> tuple[Error, int]:
        return self.error, self.cards

    def cudaDeviceGetAttribute(self, kind: Attribute, card: int) -> tuple[Error, int]:
        return OK, kind.value

    def cudaDeviceGetStreamPriorityRange(self) -> tuple[Error, int, int]:
        return OK, 0, -5

    def cudaStreamCreateWithPriority(self, flags: int, priority: int) -> tuple[Error, int]:
        assert flags == self.cudaStreamNonBlocking
        self.streams.append(PASSES if priority == 0 else CODEC)
        return OK, self.streams[-1]

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        self.streams.remove(stream)
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        assert self.captured is None, "a stream that captures must not be waited for"
        self.calls.append(("synchronize", stream))
        return (OK,)

    def _make(self) -> int:
        self.handle += 1
        return self.handle

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Error, int]:
        self.events.add(self._make())
        return OK, self.handle

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Error]:
        self.calls.append(("record", stream, event))
        return (OK,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Error]:
        self.calls.append(("follow", stream, event))
        return (OK,)

    def cudaEventQuery(self, event: int) -> tuple[Error]:
        return (OK,)

    def cudaEventElapsedTime(self, begin: int, end: int) -> tuple[Error, float]:
        return OK, 1.0

    def cudaEventSynchronize(self, event: int) -> tuple[Error]:
        self.calls.append(("wait", None, event))
        return (OK,)

    def cudaEventDestroy(self, event: int) -> tuple[Error]:
        self.events.remove(event)
        return (OK,)

    def _allocate(self, size: int) -> tuple[Error, int]:
        assert self.captured is None, "nothing may be allocated while a stream captures"
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return OK, ctypes.addressof(buffer)

    cudaMalloc = cudaMallocHost = _allocate

    def _free(self, address: int) -> tuple[Error]:
        del self.memory[address]
        return (OK,)

    cudaFree = cudaFreeHost = _free

    def queue(self, what: str, stream: int, act: Callable[[], None], *more: Any) -> None:
        """Do it, or keep it for the graph that is being captured."""
        self.calls.append((what, stream, *more))
        if self.captured is None:
            act()
        else:
            self.captured.append(act)

    def cudaMemcpyAsync(
        self, to: int, source: int, size: int, kind: Kind, stream: int
    ) -> tuple[Error]:
        if kind is Kind.cudaMemcpyHostToDevice:
            assert source in self.memory, "only pinned memory may be read after the call"
        self.queue(kind.name[10:], stream, lambda: ctypes.memmove(to, source, size), to, size)
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: CaptureMode) -> tuple[Error]:
        assert mode is CaptureMode.cudaStreamCaptureModeThreadLocal and self.captured is None
        self.calls.append(("begin", stream))
        self.captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, int | None]:
        self.calls.append(("end", stream))
        kept, self.captured = self.captured, None
        assert kept is not None
        self.graphs[self._make()] = kept
        return OK, self.handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Error, int]:
        self.executables[self._make()] = self.graphs[graph]
        return OK, self.handle

    def cudaGraphDestroy(self, graph: int) -> tuple[Error]:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Error]:
        self.calls.append(("launch", stream, graph))
        for act in self.executables[graph]:
            act()
        return (OK,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Error]:
        del self.executables[graph]
        return (OK,)

    def nothing_is_left(self) -> bool:
        held = (self.memory, self.streams, self.graphs, self.executables, self.events)
        return not any(held)


class LazyCuda(FakeCuda):
    """Streams that run nothing before the host waits, and then only what it waits for; time is counted.

    Attributes:
        takes: ms of a run or a replayed graph by stream.
        times: when an event happened last, by event.
        broken: contents of runs that fail: the next wait for their stream tells.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.queues: dict[int, deque[tuple[str, Any]]] = {PASSES: deque(), CODEC: deque()}
        self.clocks = {PASSES: 0.0, CODEC: 0.0}
        self.takes = {PASSES: 1.0, CODEC: 1.0}
        self.times: dict[int, float] = {}
        self.where: dict[int, int] = {}  # stream of an event's last record
        self.pending: dict[int, int] = {}  # records of an event that have not happened
        self.error_after: int | None = None  # runs on the stream of passes until one fails
        self.failed: Error | None = None

    def queue(self, what: str, stream: int, act: Callable[[], None], *more: Any) -> None:
        self.calls.append((what, stream, *more))
        if self.captured is not None:
            self.captured.append(act)
        else:
            self.queues[stream].append(("act", (act, what == "run")))

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Error]:
        self.calls.append(("launch", stream, graph))
        acts = list(self.executables[graph])
        self.queues[stream].append(("act", (lambda: [act() for act in acts], True)))
        return (OK,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Error]:
        self.where[event] = stream
        self.pending[event] = self.pending.get(event, 0) + 1
        self.queues[stream].append(("record", event))
        return super().cudaEventRecord(event, stream)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Error]:
        self.queues[stream].append(("follow", event))
        return super().cudaStreamWaitEvent(stream, event, flags)

    def cudaEventQuery(self, event: int) -> tuple[Error]:
        return (Error.cudaErrorNotReady if self.pending.get(event) else OK,)

    def cudaEventElapsedTime(self, begin: int, end: int) -> tuple[Error, float]:
        ready = not (self.pending.get(begin) or self.pending.get(end))
        return (
            (OK, self.times[end] - self.times[begin]) if ready else (Error.cudaErrorNotReady, 0.0)
        )

    def cudaEventSynchronize(self, event: int) -> tuple[Error]:
        super().cudaEventSynchronize(event)
        self._happen(event)
        return (self.failed or OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        super().cudaStreamSynchronize(stream)
        while self.queues[stream]:
            self._advance(stream)
        return (self.failed or OK,)

    def _happen(self, event: int) -> None:
        while self.pending.get(event):
            self._advance(self.where[event])

    def _advance(self, stream: int) -> None:
        """Let what comes first on a stream happen, and what that waits for."""
        kind, what = self.queues[stream].popleft()
        if kind == "follow":
            self._happen(what)
            self.clocks[stream] = max(self.clocks[stream], self.times.get(what, 0.0))
        elif kind == "record":
            self.pending[what] -= 1
            self.times[what] = self.clocks[stream]
        else:
            act, counts = what
            act()
            if counts:
                self.clocks[stream] += self.takes[stream]
            if counts and stream == PASSES and self.error_after is not None:
                self.error_after -= 1
                self.failed = Error.cudaErrorIllegalAddress if self.error_after < 0 else None


class FakeContext:
    """An execution context that runs an ONNX graph."""

    def __init__(self, session: Any, cuda: FakeCuda) -> None:
        self.session, self.cuda = session, cuda
        self.types = {
            v.name: DTYPES[v.type] for v in (*session.get_inputs(), *session.get_outputs())
        }
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: int | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        assert size == FakeEngine.device_memory_size_v2 and address in self.cuda.memory
        self.scratch = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.types

    def _run(
        self, names: list[str], shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]
    ) -> list[Any]:
        feeds = {}
        for name, shape in shapes.items():
            array = np.empty(shape, self.types[name])
            ctypes.memmove(array.ctypes.data, addresses[name], array.nbytes)
            feeds[name] = array
        return list(self.session.run(names, feeds))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._run([name], self.shapes, self.addresses)[0].shape)

    def execute_async_v3(self, stream: int) -> bool:
        names = [v.name for v in self.session.get_outputs()]
        shapes, addresses = dict(self.shapes), dict(self.addresses)  # as a graph would keep them
        assert self.scratch in self.cuda.memory

        def act() -> None:
            for name, array in zip(names, self._run(names, shapes, addresses), strict=True):
                ctypes.memmove(
                    addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes
                )

        self.cuda.queue("run", stream, act, shapes, addresses)
        return True


class FakeSettings:
    """IRuntimeConfig."""

    dynamic_shapes_kernel_specialization_strategy = "lazy"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> str:
        return "cache"

    def set_runtime_cache(self, held: str) -> None:
        self.held = held


class FakeEngine:
    device_memory_size_v2 = 64

    def __init__(self, content: bytes, cuda: FakeCuda) -> None:
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.cuda = cuda

    def create_runtime_config(self) -> FakeSettings:
        return FakeSettings()

    def create_execution_context(self, settings: FakeSettings) -> FakeContext:
        assert settings.allocation == "managed" and settings.held == "cache"
        assert settings.dynamic_shapes_kernel_specialization_strategy == "eager"
        return FakeContext(self.session, self.cuda)


class FakeRuntime:
    made = 0

    def __init__(self, cuda: FakeCuda) -> None:
        FakeRuntime.made += 1
        self.cuda = cuda

    def deserialize_cuda_engine(self, content: bytes) -> FakeEngine:
        return FakeEngine(content, self.cuda)


class FakeTrt(ModuleType):
    """tensorrt_rtx whose plans are ONNX files."""

    __version__ = "1.0"
    ILogger = type("ILogger", (), {})
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="managed")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def __init__(self, name: str, cuda: FakeCuda | None = None) -> None:
        super().__init__(name)
        self.Runtime = lambda logger: FakeRuntime(cast(FakeCuda, cuda))


def as_plan(manifest: Manifest, **changes: Any) -> Manifest:
    fields = {"backend": "tensorrt_rtx", "tools": {"tensorrt_rtx": "1.0"}, "gpus": ("sm89",)}
    return replace(manifest, **(fields | changes))
