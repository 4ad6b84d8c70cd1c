"""Buffers of one use: on the device, with pinned host memory that they are filled from or read into."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.cuda import Binding, Cuda


class DeviceArray:
    """A device buffer that grows to what is put into it, with pinned memory that it is filled from."""

    def __init__(self, cuda: Cuda, stream: Any = None) -> None:
        """A buffer used on `stream` (None = that of passes)."""
        self._cuda, self._address, self._bytes = cuda, 0, 0
        self._stream = cuda.stream if stream is None else stream
        self._host = PinnedArray(cuda, self._stream)
        self._copied: Any = None

    def room(self, size_bytes: int) -> int:
        """Address of at least `size_bytes`; older contents are lost when it grows."""
        if not self._address or size_bytes > self._bytes:
            self._release_device()
            self._address, self._bytes = self._cuda.allocate(size_bytes), size_bytes
        return self._address

    def _release_device(self) -> None:
        if self._address:
            self._cuda.synchronize(self._stream)
            address, self._address = self._address, 0
            self._cuda.free(address)

    def release(self) -> None:
        """Free the buffer, after everything queued has run."""
        self._release_device()
        self._host.release()
        if self._copied is not None:
            event, self._copied = self._copied, None
            self._cuda.free_event(event)

    def put(self, array: NDArray[Any]) -> Binding:
        """Queue the upload of a copy of `array`; waits for nothing but its own last upload."""
        array = np.ascontiguousarray(array)
        address = self.room(array.nbytes)
        if self._copied is None:
            self._copied = self._cuda.new_event()
        elif not self._cuda.has_happened(self._copied):
            self._cuda.wait(self._copied)
        host = self._host.room(array.nbytes)
        ctypes.memmove(host, array.ctypes.data, array.nbytes)
        self._cuda.upload(address, host, array.nbytes, self._stream)
        self._cuda.record(self._copied, self._stream)
        return address, array.shape


class PinnedArray:
    """Pinned host memory that grows to what is asked for; copies to and from it need nobody to wait."""

    def __init__(self, cuda: Cuda, stream: Any) -> None:
        """Memory for copies on `stream`."""
        self._cuda, self._stream, self._address, self._bytes = cuda, stream, 0, 0

    def room(self, size_bytes: int) -> int:
        """Address of at least `size_bytes`; older contents are lost when it grows."""
        if not self._address or size_bytes > self._bytes:
            self.release()
            self._address, self._bytes = self._cuda.allocate_host(size_bytes), size_bytes
        return self._address

    def view(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """What lies there, as float32; valid until the next copy."""
        count = int(np.prod(shape))
        content = (ctypes.c_float * count).from_address(self.room(4 * count))
        return np.ctypeslib.as_array(content).reshape(shape)

    def release(self) -> None:
        """Free it, after everything queued has run."""
        if self._address:
            self._cuda.synchronize(self._stream)
            address, self._address = self._address, 0
            self._cuda.free_host(address)
