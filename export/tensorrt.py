"""ONNX parts to TensorRT plans, with `tensorrt` or `tensorrt_rtx`: one build function takes either module.

Networks are strongly typed, so precision is what the graph says. One profile covers every valid past length
from 0 up; both modules' builders take 0 as a minimum. The builder needs no GPU when it is told its targets.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import onnx

from asd_rt.errors import BackendError, EngineError
from asd_rt.manifest import TensorSpec
from export.layers import Layer, check_layers, read_layers

MODULES = ("tensorrt", "tensorrt_rtx")
INSTALL = "pip install 'asd-rt[rtx]' for RTX cards, or TensorRT 11 from NVIDIA's index for data-centre ones"
NO_CARD_TARGETS = ("sm86", "sm89", "sm120")
MAX_BATCH = 4

_UNUSED = re.compile(r"^Unused Input: (\S+)", re.MULTILINE)  # said by the builder, not the parser
_SM = re.compile(r"sm\d{2,3}")

Range = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """One part as the builder made it.

    Attributes:
        content: the bytes of the plan.
        layers: of the detailed build log.
        proved: how many fused attentions and 8-bit products they hold, which is all that the graph has.
        seconds: that parsing and building took.
    """

    content: memoryview
    layers: tuple[Layer, ...]
    proved: Mapping[str, int]
    seconds: float


def import_tensorrt() -> ModuleType:
    """`tensorrt` where it is installed, else `tensorrt_rtx`.

    Raises:
        BackendError: neither is; says how to install one.
    """
    for name in MODULES:
        if importlib.util.find_spec(name) is not None:
            try:
                return importlib.import_module(name)
            except (ImportError, OSError) as error:
                raise BackendError(
                    f"{name} is installed but cannot be imported ({error})"
                ) from error
    raise BackendError(f"TensorRT is not installed; {INSTALL}")


def builds_for_others(trt: ModuleType) -> bool:
    """Whether the module builds for cards that are not here: tensorrt_rtx does, tensorrt does not."""
    return hasattr(trt, "ComputeCapability")


def check_gpus(trt: ModuleType, gpus: Sequence[str]) -> tuple[str, ...]:
    """`gpus` without repetitions, if the module can build for all of them.

    Raises:
        BackendError: an unknown name, or a module that builds for the present card only.
    """
    known = [
        n.lower() for n in getattr(trt, "ComputeCapability", type).__dict__ if n.startswith("SM")
    ]
    if gpus and not known:
        raise BackendError(
            f"{trt.__name__} {trt.__version__} builds for the present card only; leave --gpu out, or "
            "pip install tensorrt-rtx"
        )
    for gpu in gpus:
        if not _SM.fullmatch(gpu) or gpu not in known:
            raise BackendError(
                f"--gpu {gpu}: {trt.__name__} {trt.__version__} builds for {', '.join(known)}"
            )
    return tuple(dict.fromkeys(gpus))


def build_plan(
    trt: ModuleType,
    name: str,
    file: Path,
    inputs: Mapping[str, TensorSpec],
    ranges: Mapping[str, Range],
    gpus: Sequence[str],
) -> Plan:
    """Build one part's plan.

    Args:
        trt: `import_tensorrt()`.
        name: of the part, for errors.
        file: the part as ONNX, its weights inside or in a file beside it.
        inputs: of the part.
        ranges: (smallest, most usual, largest) size of every symbol in their shapes.
        gpus: targets such as "sm89"; empty = the present card, as for a module that builds for no other.

    Raises:
        EngineError: the parser refuses a node or leaves an input unused, the builder returns nothing or
            refuses a target, an attention was not fused, or an 8-bit product is none. Nodes are named.
    """
    began, logger = perf_counter(), _logger(trt)
    logger.lines.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(file))
    errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
    if not parsed or errors:
        raise EngineError(
            f"{name}: {trt.__name__} cannot take this graph: {'; '.join(errors) or 'no reason given'}"
        )
    graph = onnx.load(file, load_external_data=False).graph
    read = {network.get_input(i).name for i in range(network.num_inputs)}
    _check_unused(trt, name, graph, [key for key in inputs if key not in read])

    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _set_targets(trt, name, config, gpus)
    profile = builder.create_optimization_profile()
    for key, spec in inputs.items():
        sizes = [[ranges[n][i] if isinstance(n, str) else n for n in spec.shape] for i in range(3)]
        profile.set_shape(key, *sizes)
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(
            f"{name}: {trt.__name__} refuses the shape ranges {dict(ranges)}: {_last_error(logger)}"
        )
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{name}: {trt.__name__} built nothing: {_last_error(logger)}")
    _check_unused(trt, name, graph, _UNUSED.findall("\n".join(text for _, text in logger.lines)))
    layers = read_layers(text for _, text in logger.lines)
    proved = check_layers(name, graph, layers)
    return Plan(memoryview(plan), layers, proved, perf_counter() - began)


def profile_ranges(block: int, capacity: int, latent_hw: tuple[int, int]) -> dict[str, Range]:
    """Sizes that one profile covers: passes of one or two blocks behind 0 .. capacity - block frames.

    Args:
        block: frames of a block.
        capacity: frames of the cache.
        latent_hw: latent rows and columns.
    """
    tokens = (latent_hw[0] // 2) * (latent_hw[1] // 2)
    past = (capacity - block) * tokens
    return {
        "B": (1, 1, MAX_BATCH),
        "F": (block, block, 2 * block),
        "T": (block * tokens, block * tokens, 2 * block * tokens),
        "P": (0, past, past),
        "h": (latent_hw[0],) * 3,
        "w": (latent_hw[1],) * 3,
    }


@cache
def _logger(trt: ModuleType) -> Any:
    """The one logger of this process; keeps (severity, line) of everything said."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[int, str]] = []

        def log(self, severity: Any, text: str) -> None:
            self.lines.append((int(severity), text))

    return Logger()


def _check_unused(
    trt: ModuleType, name: str, graph: onnx.GraphProto, unused: Sequence[str]
) -> None:
    """Refuse inputs that TensorRT ignores: it says so in its log at most, and computes something else."""
    if not unused:
        return
    readers = ", ".join(node.name for node in graph.node if set(unused) & set(node.input))
    raise EngineError(
        f"{name}: Unused Input {', '.join(dict.fromkeys(unused))} (read by {readers or 'no node'}), which "
        f"{trt.__name__} ignores; lower the graph without it"
    )


def _set_targets(trt: ModuleType, name: str, config: Any, gpus: Sequence[str]) -> None:
    if not gpus or not builds_for_others(trt):
        return
    config.num_compute_capabilities = len(gpus)
    for index, gpu in enumerate(gpus):
        capability = getattr(trt.ComputeCapability, gpu.upper())
        if not config.set_compute_capability(capability, index):
            raise EngineError(
                f"{name}: {trt.__name__} refuses to build for {gpu}: {_last_error(_logger(trt))}"
            )


def _parser_error(error: Any) -> str:
    reason = " ".join(str(error.desc()).split("\n[checkMacros")[0].split())
    return f"{error.node_operator()} node {error.node_name()}: {reason}"


def _last_error(logger: Any) -> str:
    """The first error said, for it causes those that follow."""
    errors = [text for severity, text in logger.lines if severity <= 1]
    return " ".join(errors[0].split()) if errors else "no reason given"
