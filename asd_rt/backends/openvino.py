"""OpenVINO for the passes of bf16 and large int8 engines: bfloat16 where the processor can (AMX, AVX-512).

Its own runtime, not ONNX Runtime's plugin of it: that copies every input to memory of its own when it is
bound, so a cache in place is not possible. `OpenVinoSession` has what the backend needs of an ONNX Runtime
session. Keys and values cross its border in bfloat16, as they are computed: half the bytes, nothing to
convert. numpy has no such type; here they are the upper halves of float32, as uint16. Compiled models are
kept on disk, so that an engine opens fast the second time.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.openvino_weights import keep_weights_half
from asd_rt.errors import BackendError
from asd_rt.files import cache_folder
from asd_rt.manifest import Part

NAME = "OpenVINO"
INSTALL = "pip install openvino"
HALVED_PREFIXES = ("prompt_", "past_", "new_")
_log = logging.getLogger(__name__)


def import_openvino() -> ModuleType:
    """The openvino module.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            f"this engine runs on OpenVINO, which cannot be imported ({error}); {INSTALL}, or "
            "build the engine with --precision fp32"
        ) from error
    module: ModuleType = openvino
    return module


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)


def from_bf16(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 to float32, exactly."""
    return (values.astype(np.uint32) << 16).view(np.float32)


class _Binding:
    """Tensors of one inference request, each on memory that the caller owns."""

    def __init__(self, openvino: ModuleType, request: Any) -> None:
        self._openvino, self.request = openvino, request

    def bind_input(
        self, name: str, device: str, index: int, dtype: Any, shape: Sequence[int], address: int
    ) -> None:
        """Use the memory at `address`; arguments as of ONNX Runtime's IOBinding, uint16 for bfloat16."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_uint8 * size).from_address(address)
        array = np.frombuffer(memory, dtype=dtype).reshape(shape)
        self.request.set_tensor(name, _tensor(self._openvino, array))

    bind_output = bind_input


def _tensor(openvino: ModuleType, array: NDArray[Any]) -> Any:
    """A tensor on the memory of `array`; uint16 stands for bfloat16."""
    if array.dtype == np.uint16:
        return openvino.Tensor(array, list(array.shape), openvino.Type.bf16)
    return openvino.Tensor(array, shared_memory=True)


def keep_keys_whole(openvino: ModuleType, model: Any) -> None:
    """Let products with keys read them channels last, instead of turning all cached keys around first.

    Of attention over 10,000 tokens, turning [1, S, H, D] to [1, H, D, S] took a quarter of the time; to
    [1, H, S, D] it is a copy of whole rows.
    """
    operators = openvino.opset13
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul" or product.get_attributes()["transpose_b"]:
            continue
        turn = product.input_value(1).get_node()
        if turn.get_type_name() != "Transpose":
            continue
        order = turn.input_value(1).get_node()
        if order.get_type_name() != "Constant" or order.get_data().tolist() != [0, 2, 3, 1]:
            continue
        whole = operators.transpose(turn.input_value(0), np.array([0, 2, 1, 3], np.int64))
        first = product.get_attributes()["transpose_a"]
        other = operators.matmul(product.input_value(0), whole, first, True)
        other.set_friendly_name(product.get_friendly_name())
        product.output(0).replace(other.output(0))


class OpenVinoSession:
    """One graph, compiled for the CPU.

    Raises:
        BackendError: OpenVINO is not installed.
        RuntimeError: it refuses the graph.
    """

    def __init__(
        self, file: Path, part: Part, threads: int, sizes: Mapping[str, int], large: bool = False
    ) -> None:
        """Compile `file` for `threads`; `sizes` of the symbols in the shapes of `part` that are fixed.

        A `large` network compiles faster than its gigabytes come back from the disk, so it is not kept there.
        """
        self._openvino = import_openvino()
        core = self._openvino.Core()
        folder = None if large else cache_folder()
        if folder is not None:
            core.set_property({"CACHE_DIR": str(folder / "openvino")})
        model = core.read_model(str(file))
        shapes = {
            name: [sizes.get(n, -1) if isinstance(n, str) else n for n in spec.shape]
            for name, spec in part.inputs.items()
        }
        model.reshape(shapes)
        keep_keys_whole(self._openvino, model)
        if large:
            keep_weights_half(self._openvino, model)
        self._halved = {
            name for name in (*part.inputs, *part.outputs) if name.startswith(HALVED_PREFIXES)
        }
        model = self._halve(model, part)
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._compiled = core.compile_model(model, "CPU", settings)

    def _halve(self, model: Any, part: Part) -> Any:
        """Let keys and values cross the border in bfloat16."""
        bf16 = self._openvino.Type.bf16
        ends = self._openvino.preprocess.PrePostProcessor(model)
        for name in self._halved:
            end = ends.input(name) if name in part.inputs else ends.output(name)
            end.tensor().set_element_type(bf16)
        return ends.build()

    def io_binding(self) -> _Binding:
        """A new inference request to bind memory to."""
        return _Binding(self._openvino, self._compiled.create_infer_request())

    def run_with_iobinding(self, binding: _Binding) -> None:
        """One pass over bound memory."""
        binding.request.infer()

    def run(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One pass over `feeds`; the outputs `names`."""
        request = self._compiled.create_infer_request()
        kept = {
            name: to_bf16(array) if name in self._halved else np.ascontiguousarray(array)
            for name, array in feeds.items()
        }
        for name, array in kept.items():
            request.set_tensor(name, _tensor(self._openvino, array))
        request.infer()
        found = []
        for name in names:
            data = request.get_tensor(name).data
            half = name in self._halved
            found.append(from_bf16(data.view(np.uint16)) if half else np.array(data))
        return found
