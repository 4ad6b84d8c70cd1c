"""One plan on the card: its engine, and execution contexts that share one scratch memory.

A captured CUDA graph stands for one state of its context, so each size of pass has a context of its own. One
scratch memory serves all contexts of a part, for they run one after another on one stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from asd_rt.backends.cuda import Binding, Cuda
from asd_rt.errors import BackendError, EngineError

REBUILD = "python -m export.build --steps 1 --target tensorrt --force"


class TrtPart:
    """One plan, loaded."""

    def __init__(self, file: Path, trt: ModuleType, runtime: Any, cuda: Cuda, stream: Any) -> None:
        """The plan in `file`, to run on `stream`."""
        self.file, self._trt, self.cuda, self.stream = file, trt, cuda, stream
        self._engine = runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise EngineError(
                f"{file}: TensorRT cannot read this plan here; build it again: {REBUILD}"
            )
        self._scratch_bytes = max(1, int(self._engine.device_memory_size_v2))
        self._scratch = cuda.allocate(self._scratch_bytes)
        self._usual: TrtContext | None = None
        self._settings = self._make_settings()

    def _make_settings(self) -> Any:
        """How contexts are made: their scratch memory is ours."""
        managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._engine, "create_runtime_config"):
            return managed
        # RTX compiles kernels on the card: at once, not while passes run, for a graph keeps those that it was
        # captured with; and once for all contexts.
        settings = self._engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(managed)
        kinds = self._trt.DynamicShapesKernelSpecializationStrategy
        settings.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
        settings.set_runtime_cache(settings.create_runtime_cache())
        return settings

    def new_context(self) -> TrtContext:
        """A context for one size of pass.

        Raises:
            BackendError: the card has too little free memory.
        """
        context = self._engine.create_execution_context(self._settings)
        if context is None:
            raise BackendError(
                f"{self.file}: no execution context; the card has too little free memory"
            )
        context.set_device_memory(self._scratch, self._scratch_bytes)
        return TrtContext(self, context)

    def release(self) -> None:
        """Free its memory, after everything queued has run; it and its contexts are of no use afterwards."""
        self.cuda.synchronize(self.stream)
        self._usual = self._engine = None
        self.cuda.free(self._scratch)

    @property
    def usual(self) -> TrtContext:
        """The context of runs whose tensors change from run to run."""
        if self._usual is None:
            self._usual = self.new_context()
        return self._usual


class TrtContext:
    """One execution context: tensors are bound, then it runs any number of times."""

    def __init__(self, part: TrtPart, context: Any) -> None:
        self._part, self._context = part, context
        self._graph: Any = None
        self._ran = False

    def set_inputs(self, inputs: Mapping[str, Binding]) -> None:
        """Bind inputs by address and shape."""
        for name, (address, shape) in inputs.items():
            if not self._context.set_input_shape(name, shape):
                raise BackendError(
                    f"{self._part.file}: {name} {list(shape)} is outside the sizes this plan was built for; "
                    f"build it with other --window-frames, --max-frames or --latent-size: {REBUILD}"
                )
            self._set(name, address)

    def set_outputs(self, outputs: Mapping[str, int]) -> None:
        """Bind outputs by address."""
        for name, address in outputs.items():
            self._set(name, address)

    def shape_of(self, output: str) -> tuple[int, ...]:
        """Shape of an output, once all inputs are set."""
        return tuple(self._context.get_tensor_shape(output))

    def run(self) -> None:
        """Queue one run."""
        if not self._context.execute_async_v3(int(self._part.stream)):
            raise BackendError(f"{self._part.file}: TensorRT could not run this part")

    def replay(self) -> None:
        """Queue a run with the tensors of the last: as it is the first time, then as a CUDA graph."""
        cuda = self._part.cuda
        if self._graph is None and self._ran:
            self._graph = cuda.capture(self.run)
        if self._graph is None:
            self.run()  # what happens once in a context does not belong into a graph
            self._ran = True
        else:
            cuda.launch(self._graph)

    def release(self) -> None:
        """Let go of the graph, after everything queued has run."""
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self._part.cuda.drop(graph)

    def _set(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"{self._part.file}: has no tensor {name}; build it again: {REBUILD}")
