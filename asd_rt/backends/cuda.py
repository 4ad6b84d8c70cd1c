"""The little of CUDA that a backend needs, by way of cuda-python: probe, allocate, copy, one stream."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import BackendError

INSTALL_CUDA = "pip install 'cuda-python>=13,<14'"
ELSEWHERE = "run an .onnx engine instead, or use a machine with an NVIDIA card"

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
    """Checked calls of the CUDA runtime, one stream, and every allocation made through it."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._addresses: set[int] = set()
        self.stream = self._checked(runtime.cudaStreamCreate())

    def _checked(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error != self._runtime.cudaError_t.cudaSuccess:
            raise BackendError(
                f"CUDA failed: {error.name}; if memory is short, use a smaller window or batch"
            )
        return values[0] if values else None

    def allocate(self, size_bytes: int) -> int:
        """Address of `size_bytes` (at least 1) of device memory."""
        address = int(self._checked(self._runtime.cudaMalloc(max(1, size_bytes))))
        self._addresses.add(address)
        return address

    def free(self, address: int) -> None:
        self._addresses.remove(address)
        self._checked(self._runtime.cudaFree(address))

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy `array` to the device; done when this returns, so the caller may drop it."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, array.ctypes.data, array.nbytes, kind)
        self.synchronize()

    def download(self, array: NDArray[Any], address: int) -> None:
        """Copy from the device into `array`, after everything queued on the stream."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, address, array.nbytes, kind)
        self.synchronize()

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copy inside the device, queued on the stream."""
        self._copy(
            target, source, size_bytes, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        )

    def _copy(self, target: int, source: int, size_bytes: int, kind: Any) -> None:
        if size_bytes:
            self._checked(
                self._runtime.cudaMemcpyAsync(target, source, size_bytes, kind, self.stream)
            )

    def synchronize(self) -> None:
        self._checked(self._runtime.cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        """Free everything; may be called twice."""
        for address in sorted(self._addresses):
            self.free(address)
        if self.stream is not None:
            stream, self.stream = self.stream, None
            self._checked(self._runtime.cudaStreamDestroy(stream))


class DeviceArray:
    """A device buffer that grows to what is put into it."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._address, self._bytes = cuda, 0, 0

    def room(self, size_bytes: int) -> int:
        """Address of at least `size_bytes`; older contents are lost when it grows."""
        if not self._address or size_bytes > self._bytes:
            self.release()
            self._address, self._bytes = self._cuda.allocate(size_bytes), size_bytes
        return self._address

    def release(self) -> None:
        """Free the buffer, after everything queued has run."""
        if self._address:
            self._cuda.synchronize()
            self._cuda.free(self._address)
            self._address = 0

    def put(self, array: NDArray[Any]) -> Binding:
        """Upload `array`."""
        array = np.ascontiguousarray(array)
        address = self.room(array.nbytes)
        self._cuda.upload(address, array)
        return address, array.shape
