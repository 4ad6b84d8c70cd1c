"""The little of CUDA that a backend needs, by way of cuda-python: probe, memory, streams, events, graphs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from asd_rt.errors import BackendError

INSTALL_CUDA = "pip install 'cuda-python>=13,<14'"
ELSEWHERE = "run an .onnx engine on the CPU (--device cpu), or use a machine with an NVIDIA card"

Binding = tuple[int, tuple[int, ...]]
"""Device address and shape of one tensor."""


def import_cuda() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError) as error:
        raise BackendError(f"cuda-python cannot be imported ({error}); {INSTALL_CUDA}") from error


def present_gpu() -> str:
    """Compute capability of this machine's first card, such as "sm89".

    Raises:
        BackendError: cuda-python, the driver or a card is absent.
    """
    runtime = import_cuda()
    try:
        error, count = runtime.cudaGetDeviceCount()
    except RuntimeError as failure:  # raised by cuda-python where no driver library can be loaded
        raise BackendError(f"no NVIDIA driver ({failure}); {ELSEWHERE}") from failure
    if error != runtime.cudaError_t.cudaSuccess or not count:
        raise BackendError(f"no usable NVIDIA card ({error.name}, {count or 0} cards); {ELSEWHERE}")
    kinds = runtime.cudaDeviceAttr
    versions = []
    for kind in (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor):
        error, value = runtime.cudaDeviceGetAttribute(kind, 0)
        if error != runtime.cudaError_t.cudaSuccess:
            raise BackendError(
                f"the NVIDIA card does not tell its compute capability ({error.name}); {ELSEWHERE}"
            )
        versions.append(value)
    return f"sm{versions[0]}{versions[1]}"


class Cuda:
    """Checked calls of the CUDA runtime, two streams, and everything that was made through it.

    Attributes:
        stream: of passes and of what serves them.
        codec_stream: of the codec; it waits for nothing that is queued on `stream`, and comes first where
            both want the card.
        closed: everything was released.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._addresses: set[int] = set()
        self._pinned: set[int] = set()
        self._graphs: list[Any] = []
        self._events: list[Any] = []
        self._streams: list[Any] = []
        self.closed = False
        flags = runtime.cudaStreamNonBlocking
        try:
            least, greatest = self._checked(runtime.cudaDeviceGetStreamPriorityRange())
            for priority in (least, greatest):
                stream = self._checked(runtime.cudaStreamCreateWithPriority(flags, priority))
                self._streams.append(stream)
        except BackendError:
            self.close()
            raise
        self.stream, self.codec_stream = self._streams

    def _checked(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error != self._runtime.cudaError_t.cudaSuccess:
            raise BackendError(
                f"CUDA failed: {error.name}; if memory is short, use a smaller window or batch"
            )
        return values[0] if len(values) == 1 else tuple(values)

    def allocate(self, size_bytes: int) -> int:
        """Address of `size_bytes` (at least 1) of device memory."""
        address = int(self._checked(self._runtime.cudaMalloc(max(1, size_bytes))))
        self._addresses.add(address)
        return address

    def free(self, address: int) -> None:
        self._addresses.remove(address)
        self._checked(self._runtime.cudaFree(address))

    def allocate_host(self, size_bytes: int) -> int:
        """Address of `size_bytes` (at least 1) of pinned host memory, which a copy may read later."""
        address = int(self._checked(self._runtime.cudaMallocHost(max(1, size_bytes))))
        self._pinned.add(address)
        return address

    def free_host(self, address: int) -> None:
        self._pinned.remove(address)
        self._checked(self._runtime.cudaFreeHost(address))

    def upload(self, address: int, source: int, size_bytes: int, stream: Any) -> None:
        """Queue a copy of pinned host memory to the device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, source, size_bytes, kind, stream)

    def download(self, array: NDArray[Any], address: int, stream: Any = None) -> None:
        """Copy from the device into `array`, after everything queued on the stream; waits for it."""
        stream = self.stream if stream is None else stream
        self.fetch(array.ctypes.data, address, array.nbytes, stream)
        self.synchronize(stream)

    def fetch(self, target: int, address: int, size_bytes: int, stream: Any) -> None:
        """Queue a copy from the device to host memory, which must be pinned where nothing is to wait."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(target, address, size_bytes, kind, stream)

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copy inside the device, queued on `stream`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._copy(target, source, size_bytes, kind, self.stream)

    def _copy(self, target: int, source: int, size_bytes: int, kind: Any, stream: Any) -> None:
        if size_bytes:
            self._checked(self._runtime.cudaMemcpyAsync(target, source, size_bytes, kind, stream))

    def new_event(self, timed: bool = False) -> Any:
        """An event for `record`; `timed` where `elapsed_ms` is to know when it happened."""
        runtime = self._runtime
        flags = runtime.cudaEventDefault if timed else runtime.cudaEventDisableTiming
        event = self._checked(runtime.cudaEventCreateWithFlags(flags))
        self._events.append(event)
        return event

    def free_event(self, event: Any) -> None:
        self._events.remove(event)
        self._checked(self._runtime.cudaEventDestroy(event))

    def record(self, event: Any, stream: Any) -> None:
        """`event` happens when all that is queued on `stream` by now has run."""
        self._checked(self._runtime.cudaEventRecord(event, stream))

    def follow(self, stream: Any, event: Any) -> None:
        """Let what is queued on `stream` from now on wait for `event`; the host does not."""
        self._checked(self._runtime.cudaStreamWaitEvent(stream, event, 0))

    def wait(self, event: Any) -> None:
        """Let the host wait for `event`; returns at once where it was never recorded.

        Raises:
            BackendError: what was queued before it failed.
        """
        self._checked(self._runtime.cudaEventSynchronize(event))

    def has_happened(self, event: Any) -> bool:
        """Whether `event` has happened already, or was never recorded."""
        error, *_ = self._runtime.cudaEventQuery(event)
        if error == self._runtime.cudaError_t.cudaErrorNotReady:
            return False
        self._checked((error,))
        return True

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Time between two timed events, both of which have happened."""
        return float(self._checked(self._runtime.cudaEventElapsedTime(begin, end)))

    def capture(self, queue: Callable[[], None]) -> Any:
        """What `queue` queues on `stream`, as a graph for `launch`; nothing of it runs.

        Raises:
            BackendError: it cannot be captured; the stream is as before.
        """
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._checked(runtime.cudaStreamBeginCapture(self.stream, mode))
        graph = None
        try:
            try:
                queue()
            finally:  # a stream left capturing would be of no use
                error, graph = runtime.cudaStreamEndCapture(self.stream)
            self._checked((error,))
            whole = self._checked(runtime.cudaGraphInstantiate(graph, 0))
        finally:
            if graph is not None:
                runtime.cudaGraphDestroy(graph)
        self._graphs.append(whole)
        return whole

    def launch(self, graph: Any) -> None:
        """Queue a captured graph on `stream`."""
        self._checked(self._runtime.cudaGraphLaunch(graph, self.stream))

    def drop(self, graph: Any) -> None:
        """Release a captured graph that does not run."""
        self._graphs.remove(graph)
        self._checked(self._runtime.cudaGraphExecDestroy(graph))

    def synchronize(self, stream: Any = None) -> None:
        """Let the host wait for `stream`, or for both."""
        for one in self._streams if stream is None else [stream]:
            self._checked(self._runtime.cudaStreamSynchronize(one))

    def close(self) -> None:
        """Release everything, whatever fails on the way; may be called twice.

        Raises:
            BackendError: something could not be released, or an earlier pass failed.
        """
        runtime, self.closed = self._runtime, True
        todo = [
            *((runtime.cudaStreamSynchronize, stream) for stream in self._streams),
            *((runtime.cudaGraphExecDestroy, graph) for graph in self._graphs),
            *((runtime.cudaEventDestroy, event) for event in self._events),
            *((runtime.cudaFree, address) for address in sorted(self._addresses)),
            *((runtime.cudaFreeHost, address) for address in sorted(self._pinned)),
            *((runtime.cudaStreamDestroy, stream) for stream in self._streams),
        ]
        self._streams, self._graphs, self._events = [], [], []
        self._addresses, self._pinned = set(), set()
        results = [release(handle) for release, handle in todo]
        for result in results:
            self._checked(result)
